// CPU kernels, written with the vector types of GCC and Clang and compiled once per instruction set: ms_deform_attn.cpp
// includes this file several times, each time in another namespace, with
//   M2F_TARGET        the function attribute that selects the instruction set
//   M2F_VECTOR_BYTES  the size of its vectors
// Hence no include guard, and no includes.
//
// The D channels of a position and head are contiguous and processed as vectors; the weights and the position of a
// sample are scalars broadcast over them. These scalars are computed in advance for many samples at once, with vectors
// over samples.

#define M2F_INLINE static inline __attribute__((always_inline)) M2F_TARGET

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(M2F_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(M2F_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t index;
  typedef index index_type __attribute__((vector_size(M2F_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(M2F_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(M2F_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t index;
  typedef index index_type __attribute__((vector_size(M2F_VECTOR_BYTES)));
};

template <typename T>
constexpr int64_t lanes = M2F_VECTOR_BYTES / sizeof(T);

template <typename T>
using Vec = typename Vector<T>::type;
template <typename T>
using IndexVec = typename Vector<T>::index_type;

// The D channels are processed in pieces: vectors, then single numbers for the rest.
template <typename T, bool IsVector>
struct Piece {
  using type = Vec<T>;
  M2F_INLINE type load(const T* p) { return *reinterpret_cast<const typename Vector<T>::unaligned*>(p); }
  M2F_INLINE void store(T* p, type v) { *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v; }
  M2F_INLINE T sum(type v) {
    T total = v[0];
    for (int i = 1; i < lanes<T>; ++i) total += v[i];
    return total;
  }
};
template <typename T>
struct Piece<T, false> {
  using type = T;
  M2F_INLINE type load(const T* p) { return *p; }
  M2F_INLINE void store(T* p, type v) { *p = v; }
  M2F_INLINE T sum(type v) { return v; }
};

// exp(x) for x <= 0, to 2 ulp; for x < -87 it is 0 or less than 1e-37. NaN stays NaN.
M2F_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; adding and subtracting 1.5 * 2^23 rounds to an integer.
  const Vec<float> lowest = Vec<float>{} - 87.0f;
  const Vec<float> clamped = x < lowest ? lowest : x;
  const Vec<float> shifted = clamped * 1.44269504f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = Vec<float>{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n: the low bits of `shifted` hold n.
  const IndexVec<float> bits = (reinterpret_cast<IndexVec<float>>(shifted) + 127) << 23;
  const Vec<float> y = p * reinterpret_cast<Vec<float>>(bits);
  return x == x ? y : x;
}

M2F_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < lanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// Arrays over the samples processed together: several rows (one per query and head) of L * P samples, each row padded
// to whole vectors. Each step runs over all rows before the next begins, because a vector load right after scalar
// stores to the same address stalls.
template <typename T>
struct Samples {
  using Index = typename Vector<T>::index;
  int64_t row_length;     // padded
  int64_t count;          // of all rows together
  T *x, *y;               // pixel coordinates
  T *width, *height;      // of the level; 0 in the padding, which is therefore outside
  T* weight;              // attention weight
  T *right, *below;       // bilinear weights of the right and the lower corners
  T* corner[4];           // weight of each corner: upper left, upper right, lower left, lower right
  Index *column, *row;    // of the upper left corner
  Index* position;        // row * width + column
  Index* state;           // kOutside, kEdge or kInside

  static constexpr int64_t kArrays = 15;
  M2F_TARGET static int64_t padded(int64_t count) { return (count + lanes<T> - 1) / lanes<T> * lanes<T>; }

  // `memory` holds kArrays * rows * padded(L * P) zeros.
  M2F_TARGET Samples(const Sizes& z, int64_t rows, T* memory)
      : row_length(padded(z.levels * z.points)), count(rows * row_length) {
    T** arrays[] = {&x,     &y,     &width,     &height,    &weight,   &right,
                    &below, corner, corner + 1, corner + 2, corner + 3};
    for (T** array : arrays) {
      *array = memory;
      memory += count;
    }
    Index** indices[] = {&column, &row, &position, &state};
    for (Index** array : indices) {
      *array = reinterpret_cast<Index*>(memory);
      memory += count;
    }
    for (int64_t first = 0; first < count; first += row_length) {
      for (int64_t i = 0; i < z.levels * z.points; ++i) {
        width[first + i] = T(z.level[i / z.points].width);
        height[first + i] = T(z.level[i / z.points].height);
      }
    }
  }
};

constexpr int kOutside = 0, kEdge = -1, kInside = -2;  // no corner, some corners, all corners on the level

// Computes everything else from x, y and weight, for the first `count` samples.
template <typename T>
M2F_INLINE void locate(Samples<T>& s, int64_t count) {
  using P = Piece<T, true>;
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const Vec<T> x = P::load(s.x + i), y = P::load(s.y + i);
    const Vec<T> width = P::load(s.width + i), height = P::load(s.height + i);
    // False for NaN.
    const IndexVec<T> any = (x > T(-1)) & (y > T(-1)) & (x < width) & (y < height);
    const Vec<T> zero{};
    const Vec<T> safe_x = any ? x : zero, safe_y = any ? y : zero;
    IndexVec<T> column = __builtin_convertvector(safe_x, IndexVec<T>);
    IndexVec<T> row = __builtin_convertvector(safe_y, IndexVec<T>);
    // The conversion rounds towards zero; a vector comparison gives -1 if it holds.
    column += __builtin_convertvector(column, Vec<T>) > safe_x;
    row += __builtin_convertvector(row, Vec<T>) > safe_y;
    const Vec<T> left = __builtin_convertvector(column, Vec<T>), above = __builtin_convertvector(row, Vec<T>);
    const IndexVec<T> inside = any & (column >= 0) & (row >= 0) & (left + T(1) < width) & (above + T(1) < height);
    const Vec<T> right = safe_x - left, below = safe_y - above, weight = P::load(s.weight + i);
    const Vec<T> lower = weight * below, upper = weight - lower;
    const Vec<T> upper_right = upper * right, lower_right = lower * right;
    P::store(s.right + i, right);
    P::store(s.below + i, below);
    P::store(s.corner[0] + i, upper - upper_right);
    P::store(s.corner[1] + i, upper_right);
    P::store(s.corner[2] + i, lower - lower_right);
    P::store(s.corner[3] + i, lower_right);
    const IndexVec<T> position = row * __builtin_convertvector(width, IndexVec<T>) + column;
    __builtin_memcpy(s.position + i, &position, sizeof(position));
    __builtin_memcpy(s.column + i, &column, sizeof(column));
    __builtin_memcpy(s.row + i, &row, sizeof(row));
    const IndexVec<T> state = any + inside;
    __builtin_memcpy(s.state + i, &state, sizeof(state));
  }
}

// Replaces one row of weights by its softmax; the padding holds -inf and becomes 0.
template <typename T>
M2F_INLINE void softmax(T* weight, int64_t padded) {
  using P = Piece<T, true>;
  if (padded == 0) return;
  Vec<T> highest = P::load(weight);
  for (int64_t i = lanes<T>; i < padded; i += lanes<T>) {
    const Vec<T> w = P::load(weight + i);
    highest = w > highest ? w : highest;
  }
  T top = highest[0];
  for (int i = 1; i < lanes<T>; ++i) top = highest[i] > top ? highest[i] : top;
  Vec<T> sums{};
  for (int64_t i = 0; i < padded; i += lanes<T>) {
    const Vec<T> e = exp_nonpositive(P::load(weight + i) - top);
    sums += e;
    P::store(weight + i, e);
  }
  const T scale = T(1) / P::sum(sums);
  for (int64_t i = 0; i < padded; i += lanes<T>) P::store(weight + i, P::load(weight + i) * scale);
}

// out = sum of weight * bilinear value over the row of samples that starts at `first`, for N vectors of the channels.
// `value` points to the first position of the image, at this head and these channels; positions are `stride` apart.
template <typename T, bool IsVector, int N>
M2F_INLINE void gather(
    const Sizes& z, const Samples<T>& s, int64_t first, const T* value, int64_t stride, T* out) {
  using P = Piece<T, IsVector>;
  constexpr int64_t width = IsVector ? lanes<T> : 1;
  // Two sums per vector shorten the dependency chain of the four corners.
  typename P::type upper[N] = {}, lower[N] = {};
  int64_t i = first;
  for (int64_t l = 0; l < z.levels; ++l) {
    const T* level = value + z.level[l].start * stride;
    const int64_t level_width = z.level[l].width, level_height = z.level[l].height;
    for (int64_t p = 0; p < z.points; ++p, ++i) {
      if (s.state[i] == kOutside) continue;
      const T w00 = s.corner[0][i], w01 = s.corner[1][i], w10 = s.corner[2][i], w11 = s.corner[3][i];
      const T* p00 = level + s.position[i] * stride;
      const T* p10 = p00 + level_width * stride;
      if (__builtin_expect(s.state[i] == kInside, 1)) {
        for (int n = 0; n < N; ++n) {
          upper[n] += w00 * P::load(p00 + n * width);
          lower[n] += w10 * P::load(p10 + n * width);
          upper[n] += w01 * P::load(p00 + stride + n * width);
          lower[n] += w11 * P::load(p10 + stride + n * width);
        }
        continue;
      }
      const int64_t column = s.column[i], row = s.row[i];
      const bool has_left = column >= 0, has_right = column + 1 < level_width;
      for (int n = 0; n < N; ++n) {
        if (row >= 0) {
          if (has_left) upper[n] += w00 * P::load(p00 + n * width);
          if (has_right) upper[n] += w01 * P::load(p00 + stride + n * width);
        }
        if (row + 1 < level_height) {
          if (has_left) lower[n] += w10 * P::load(p10 + n * width);
          if (has_right) lower[n] += w11 * P::load(p10 + stride + n * width);
        }
      }
    }
  }
  for (int n = 0; n < N; ++n) P::store(out + n * width, upper[n] + lower[n]);
}

// Fills x, y and weight of the row of samples that starts at `first`, for one (image, query, head).
template <typename T>
M2F_INLINE void read_row(const Arguments<T>& a, int64_t b, int64_t q, int64_t m, Samples<T>& s, int64_t first) {
  const Sizes& z = a.sizes;
  const int64_t count = z.levels * z.points, row = (b * z.queries + q) * z.heads + m;
  const T* locations = a.locations + row * count * 2;
  T *x = s.x + first, *y = s.y + first;
  if (a.reference == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      x[i] = locations[2 * i] * s.width[i] - T(0.5);
      y[i] = locations[2 * i + 1] * s.height[i] - T(0.5);
    }
  } else {
    const T* reference = a.reference + ((z.per_image_reference ? b * z.queries : 0) + q) * z.levels * 2;
    for (int64_t l = 0; l < z.levels; ++l) {
      const T centre_x = reference[2 * l] * T(z.level[l].width) - T(0.5);
      const T centre_y = reference[2 * l + 1] * T(z.level[l].height) - T(0.5);
      for (int64_t i = l * z.points; i < (l + 1) * z.points; ++i) {
        x[i] = centre_x + locations[2 * i];
        y[i] = centre_y + locations[2 * i + 1];
      }
    }
  }
  T* weight = s.weight + first;
  for (int64_t i = 0; i < count; ++i) weight[i] = a.weights[row * count + i];
  if (a.reference != nullptr) {
    for (int64_t i = count; i < s.row_length; ++i) weight[i] = -__builtin_inf();
  }
}

// Forward of queries [begin, end) of the B * Q, all heads of a query at once. `memory` is that of Samples for M rows.
template <typename T>
M2F_TARGET void forward(const Arguments<T>& a, T* output, T* memory, int64_t begin, int64_t end) {
  const Sizes& z = a.sizes;
  const int64_t stride = z.heads * z.channels;
  Samples<T> s(z, z.heads, memory);
  for (int64_t bq = begin; bq < end; ++bq) {
    const int64_t b = bq / z.queries, q = bq % z.queries;
    for (int64_t m = 0; m < z.heads; ++m) read_row(a, b, q, m, s, m * s.row_length);
    if (a.reference != nullptr) {
      for (int64_t m = 0; m < z.heads; ++m) softmax(s.weight + m * s.row_length, s.row_length);
    }
    locate(s, s.count);
    for (int64_t m = 0; m < z.heads; ++m) {
      const T* value = a.value + b * z.values * stride + m * z.channels;
      T* out = output + bq * stride + m * z.channels;
      const int64_t first = m * s.row_length;
      int64_t d = 0;
      for (; d + 4 * lanes<T> <= z.channels; d += 4 * lanes<T>)
        gather<T, true, 4>(z, s, first, value + d, stride, out + d);
      for (; d + lanes<T> <= z.channels; d += lanes<T>) gather<T, true, 1>(z, s, first, value + d, stride, out + d);
      for (; d < z.channels; ++d) gather<T, false, 1>(z, s, first, value + d, stride, out + d);
    }
  }
}

// Adds the dot products of grad with the four corners (upper left, upper right, lower left, lower right) to `dots`, and
// weight * grad to the corners of grad_value, for N vectors of the channels.
template <typename T, bool IsVector, int N>
M2F_INLINE void scatter(
    const bool* on, const int64_t* offset, const T* weight, const T* value, T* grad_value, const T* grad, T* dots) {
  using P = Piece<T, IsVector>;
  constexpr int64_t width = IsVector ? lanes<T> : 1;
  typename P::type g[N];
  for (int n = 0; n < N; ++n) g[n] = P::load(grad + n * width);
  for (int c = 0; c < 4; ++c) {
    if (!on[c]) continue;
    const T* v = value + offset[c];
    T* out = grad_value + offset[c];
    typename P::type dot = g[0] * P::load(v);
    for (int n = 1; n < N; ++n) dot += g[n] * P::load(v + n * width);
    for (int n = 0; n < N; ++n) P::store(out + n * width, P::load(out + n * width) + weight[c] * g[n]);
    dots[c] += P::sum(dot);
  }
}

// Gradients of one (image, query, head), whose row of samples starts at `first`. `value` and `grad_value` are (S, D),
// for this head only.
template <typename T>
M2F_INLINE void backward_row(
    const Arguments<T>& a,
    const Gradients<T>& g,
    const Samples<T>& s,
    int64_t first,
    int64_t row,
    const T* value,
    T* grad_value) {
  const Sizes& z = a.sizes;
  const bool fused = a.reference != nullptr;
  const int64_t count = z.levels * z.points, stride = z.channels;
  const T* grad = g.output + row * z.channels;
  T* grad_locations = g.locations + row * count * 2;
  T* grad_weights = g.weights + row * count;
  T mean = 0;  // weighted mean of the weight gradients, for the softmax
  int64_t i = 0;
  for (int64_t l = 0; l < z.levels; ++l) {
    const T *level_value = value + z.level[l].start * stride;
    T* level_grad = grad_value + z.level[l].start * stride;
    const int64_t level_width = z.level[l].width, level_height = z.level[l].height;
    // Offsets are in pixels, locations in units of the level size.
    const T scale_x = fused ? T(1) : T(level_width), scale_y = fused ? T(1) : T(level_height);
    for (int64_t p = 0; p < z.points; ++p, ++i) {
      const int64_t k = first + i;
      T dots[4] = {0, 0, 0, 0};
      if (s.state[k] != kOutside) {
        const int64_t column = s.column[k], r = s.row[k];
        const bool up = r >= 0, down = r + 1 < level_height, left = column >= 0, right = column + 1 < level_width;
        const bool on[4] = {up && left, up && right, down && left, down && right};
        const int64_t upper = s.position[k] * stride, lower = upper + level_width * stride;
        const int64_t offset[4] = {upper, upper + stride, lower, lower + stride};
        const T weight[4] = {s.corner[0][k], s.corner[1][k], s.corner[2][k], s.corner[3][k]};
        int64_t d = 0;
        for (; d + 4 * lanes<T> <= z.channels; d += 4 * lanes<T>)
          scatter<T, true, 4>(on, offset, weight, level_value + d, level_grad + d, grad + d, dots);
        for (; d + lanes<T> <= z.channels; d += lanes<T>)
          scatter<T, true, 1>(on, offset, weight, level_value + d, level_grad + d, grad + d, dots);
        for (; d < z.channels; ++d)
          scatter<T, false, 1>(on, offset, weight, level_value + d, level_grad + d, grad + d, dots);
      }
      const T right = s.right[k], below = s.below[k], left = T(1) - right, above = T(1) - below;
      const T upper = left * dots[0] + right * dots[1], lower = left * dots[2] + right * dots[3];
      const T along_x = above * (dots[1] - dots[0]) + below * (dots[3] - dots[2]);
      grad_weights[i] = above * upper + below * lower;
      grad_locations[2 * i] = s.weight[k] * along_x * scale_x;
      grad_locations[2 * i + 1] = s.weight[k] * (lower - upper) * scale_y;
      mean += s.weight[k] * grad_weights[i];
    }
  }
  if (!fused) return;
  for (i = 0; i < count; ++i) grad_weights[i] = s.weight[first + i] * (grad_weights[i] - mean);
}

// Backward of units [begin, end) of the B * M (image, head). A unit writes only memory of its own, in an order that
// does not depend on the number of threads. `memory` is that of Samples for kBlock rows. `packed` holds 2 * S * D
// numbers, the values of one head and their gradients: in the tensors they are M * D numbers apart, usually a power of
// two, and would compete for few sets of each cache.
template <typename T>
M2F_TARGET void backward(
    const Arguments<T>& a, const Gradients<T>& g, T* memory, T* packed, int64_t begin, int64_t end) {
  const Sizes& z = a.sizes;
  const int64_t stride = z.heads * z.channels, bytes = z.channels * sizeof(T);
  T *value = packed, *grad_value = packed + z.values * z.channels;
  Samples<T> s(z, kBlock, memory);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t m = unit % z.heads, b = unit / z.heads, start = b * z.values * stride + m * z.channels;
    for (int64_t i = 0; i < z.values; ++i) {
      __builtin_memcpy(value + i * z.channels, a.value + start + i * stride, bytes);
    }
    __builtin_memset(grad_value, 0, z.values * bytes);
    for (int64_t q0 = 0; q0 < z.queries; q0 += kBlock) {
      const int64_t queries = z.queries - q0 < kBlock ? z.queries - q0 : kBlock;
      for (int64_t q = 0; q < queries; ++q) read_row(a, b, q0 + q, m, s, q * s.row_length);
      if (a.reference != nullptr) {
        for (int64_t q = 0; q < queries; ++q) softmax(s.weight + q * s.row_length, s.row_length);
      }
      locate(s, queries * s.row_length);
      for (int64_t q = 0; q < queries; ++q) {
        const int64_t row = (b * z.queries + q0 + q) * z.heads + m;
        backward_row(a, g, s, q * s.row_length, row, value, grad_value);
      }
    }
    for (int64_t i = 0; i < z.values; ++i) {
      __builtin_memcpy(g.value + start + i * stride, grad_value + i * z.channels, bytes);
    }
  }
}

template <typename T>
constexpr Kernels<T> kernels = {forward<T>, backward<T>, Samples<T>::kArrays, lanes<T>};

#undef M2F_INLINE
