// Fast backward: D/4 lanes process one head for D/4 consecutive queries.
//
// The expected bottleneck is the number of grad_value rows added to in L2: 4 per sample, 1 GB for one 1024 x 1024
// image. There are two ways to add fewer; MASK2FORMER_BACKWARD selects one of them:
//
// registers (default): The lanes process the same sample (level and point) of consecutive queries, and accumulate the
// 4 corners of the current cell in registers. If the next query falls into the same cell, nothing is written; if it
// falls into the cell to its right, only the left column is. With the same offsets for all queries that saves half of
// the additions where queries and sampled level have the same resolution, and three quarters or more where the level is
// coarser. It saves nearly nothing if offsets vary by pixels from query to query: 2.5 % for those of `benchmark op`
// (normal, 2 pixels), computed from its cells.
//
// shared (D = 32 only): A block collects its additions in a window of the level in shared memory, around the mean of
// its samples, and writes each row once. Samples outside the window go to L2 directly. The offsets of `benchmark op`
// then need 19 % of the additions to L2, at 45 more instructions per sample of a warp and with 4 blocks per
// multiprocessor instead of 5 or 6 (2 where it has 100 kB of shared memory). Neither has been measured.
//
// Lane j prepares the samples of query j and receives their gradients, 3 sums over the lanes per query. Two queries are
// processed at a time: their loads overlap and they share shuffles (neighbouring lanes exchange, even lanes keep the
// first query), 4.5 per query instead of 9 for D = 32. Sums are always fp32.
//
// Per sample of a whole warp for D = 32 (4 heads per warp): 4 + 1 loads of 4 channels per lane, 16 L1 wavefronts for
// the values (8 for 16-bit types), 4.5 shuffles and at most 4 vector atomics (4 times as many scalar ones before
// compute capability 9.0). Instructions, counted in the code of nvcc 13.0 for compute capability 9.0, for 3 x 4 samples
// in cells that share nothing: 210 for float and 224 for bfloat16, of which the loop is 185 and 199; 36 are FMA.

#pragma once

#include "common.cuh"

namespace mask2former::cuda {

constexpr int kBackwardThreads = 128;
constexpr int kChunk = 4;  // samples loaded at a time

// Where additions to grad_value are collected before they go to L2.
enum class Collect {
  kRegisters,     // one cell per run of queries
  kSharedMemory,  // a window of the level per block
};

// Target blocks per multiprocessor: as many as fit without spilling registers.
template <typename T, bool kFixed, Collect kCollect>
constexpr int kBackwardBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    4;
#else
    kCollect == Collect::kRegisters && (kFixed || sizeof(T) == 2) ? 5 : 4;
#endif

// Positions of the window: a tile of 8 x 16 queries and a margin, within 48 kB of shared memory for D = 32.
constexpr int kWindowWidth = 14, kWindowHeight = 20;

// Sums over channels of grad_output times the sample and times its derivatives in x and y, for a weight of one.
struct Gradients {
  float weight, x, y;
};

// Sums over a pair of lanes: the first lane gets the sum of `low`, the second that of `high`.
__device__ __forceinline__ float exchange(float low, float high, bool keep_high) {
  const float received = __shfl_xor_sync(kWarp, keep_high ? low : high, 1);
  return (keep_high ? high : low) + received;
}

__device__ __forceinline__ unsigned long long pack(float low, float high) {
  return uint64_t{__float_as_uint(high)} << 32 | __float_as_uint(low);
}
__device__ __forceinline__ unsigned long long add_to_pair(unsigned long long pair, const float* in) {
  const float low = __uint_as_float(static_cast<unsigned>(pair));
  return pack(low + in[0], __uint_as_float(static_cast<unsigned>(pair >> 32)) + in[1]);
}

// Adds atomically to kCount rows of shared memory, kStride numbers apart. Shared memory has no addition of floats:
// atomicAdd is a loop of 6 instructions for each of them. One attempt for all, two numbers at a time, needs fewer and
// waits once. It fails if another thread adds to the same place meanwhile.
template <int kCount, int kStride>
__device__ __forceinline__ void add_shared(float* to, float (&in)[kCount][4]) {
  while (true) {
    bool done[kCount][2], all_done = true;
    unsigned long long old[kCount][2];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const float4 vector = *reinterpret_cast<const float4*>(to + n * kStride);
      old[n][0] = pack(vector.x, vector.y);
      old[n][1] = pack(vector.z, vector.w);
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* const at = reinterpret_cast<unsigned long long*>(to + n * kStride + 2 * half);
        const unsigned long long sum = add_to_pair(old[n][half], in[n] + 2 * half);
        done[n][half] = atomicCAS(at, old[n][half], sum) == old[n][half];
        all_done &= done[n][half];
      }
    }
    if (all_done) return;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) in[n][i] = done[n][i / 2] ? 0.f : in[n][i];
    }
  }
}

// Processes one sample of each query of the run, in order.
template <typename T, int kLanes, Collect kCollect>
struct Sweep {
  static constexpr int kChannels = 4 * kLanes;

  const Sample* samples;  // of the run's queries
  const int* slots;       // their positions in the window, -1 outside
  const T* value;         // this lane's channels in row 0
  const T* grad_output;   // this lane's channels of the first query
  float* grad_value;      // this lane's channels in row 0
  float* window;          // this lane's channels in slot 0
  int heads, row_step, lane;
  bool adds;  // to grad_value

  int cell = 0;  // the cell that `sum` belongs to, as Sample::cell
  float sum[4][4];

  __device__ __forceinline__ void clear(int corner) {
    for (int i = 0; i < 4; ++i) sum[corner][i] = 0.f;
  }

  // Adds column 0 or 1 of the cell to memory.
  __device__ __forceinline__ void write_column(int column) {
    if (!adds || !(cell & (column == 0 ? kLeft : kRight))) return;
    const int row = (cell >> 4) + column * heads;
    if (cell & kTop) add_channels(to_row<kChannels>(grad_value, row), sum[column]);
    if (cell & kBottom) add_channels(to_row<kChannels>(grad_value, row + row_step), sum[2 + column]);
  }

  __device__ __forceinline__ void move_to(int next) {
    if (next == cell) return;
    write_column(0);
    // The cell to the right: its left column is our right column, with the same corners inside.
    if (next == cell + heads * 16 && (cell & kColumns) == kColumns) {
      for (int i = 0; i < 4; ++i) {
        sum[0][i] = sum[1][i];
        sum[2][i] = sum[3][i];
      }
    } else {
      write_column(1);
      clear(0);
      clear(2);
    }
    clear(1);
    clear(3);
    cell = next;
  }

  // Adds the upper or lower two corners of the current cell to the window.
  __device__ __forceinline__ void add_line(float* to, int upper) {
    float both[2][4], one[1][4];
    for (int i = 0; i < 4; ++i) {
      both[0][i] = sum[upper][i];
      both[1][i] = sum[upper + 1][i];
      one[0][i] = cell & kLeft ? sum[upper][i] : sum[upper + 1][i];
    }
    if ((cell & kColumns) == kColumns) {
      add_shared<2, kChannels>(to, both);
    } else {
      add_shared<1, kChannels>(cell & kLeft ? to : to + kChannels, one);
    }
  }

  struct Loaded {
    Four<T> corner[4], grad;
  };

  __device__ __forceinline__ void load(int j, const Sample& sample, Loaded& loaded) const {
    const int row = sample.cell >> 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      constexpr int kNeeded[4] = {kTop | kLeft, kTop | kRight, kBottom | kLeft, kBottom | kRight};
      const int at = row + (c & 1 ? heads : 0) + (c & 2 ? row_step : 0);
      if ((sample.cell & kNeeded[c]) == kNeeded[c]) {
        loaded.corner[c].load(to_row<kChannels>(value, at));
      }
    }
    if (sample.cell != 0) loaded.grad.load(to_row<kChannels>(grad_output, j * heads));
  }

  static __device__ __forceinline__ Gradients differentiate(const Sample& sample, const Loaded& loaded) {
    float grad[4], product[4] = {};
    loaded.grad.get(grad);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float corner[4];
      loaded.corner[c].get(corner);
#pragma unroll
      for (int i = 0; i < 4; ++i) product[c] += corner[i] * grad[i];
    }
    const float along_top = product[1] - product[0];
    const float along_bottom = product[3] - product[2];
    const float at_top = product[0] + sample.fx * along_top;
    const float down = product[2] + sample.fx * along_bottom - at_top;
    return {at_top + sample.fy * down, along_top + sample.fy * (along_bottom - along_top), down};
  }

  __device__ __forceinline__ void add(int j, const Sample& sample, const Four<T>& loaded) {
    if (sample.cell == 0) return;
    if constexpr (kCollect == Collect::kRegisters) {
      move_to(sample.cell);
    } else {
      cell = sample.cell;
      for (int c = 0; c < 4; ++c) clear(c);
    }
    const float bottom = sample.weight * sample.fy;
    const float top = sample.weight - bottom;
    const float share[4] = {top - top * sample.fx, top * sample.fx, bottom - bottom * sample.fx, bottom * sample.fx};
    float grad[4];
    loaded.get(grad);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[c][i] += share[c] * grad[i];
    }
    if constexpr (kCollect == Collect::kSharedMemory) {
      const int slot = slots[j];
      if (slot >= 0) {
        float* to = window + slot * kChannels;
        if (cell & kTop) add_line(to, 0);
        if (cell & kBottom) add_line(to + kWindowWidth * kChannels, 2);
      } else {
        write_column(0);
        write_column(1);
      }
    }
  }

  // Processes one sample of all queries of the run; lane j returns the sums of query j.
  __device__ __forceinline__ Gradients run() {
    for (int c = 0; c < 4; ++c) clear(c);
    cell = 0;
    Gradients mine{0.f, 0.f, 0.f};
    const bool keep_high = lane & 1;
#pragma unroll 1
    for (int j = 0; j < kLanes; j += 2) {
      const Sample one = samples[j], two = samples[j + 1];
      Loaded loaded_one, loaded_two;
      load(j, one, loaded_one);
      load(j + 1, two, loaded_two);
      const Gradients low = differentiate(one, loaded_one);
      const Gradients high = differentiate(two, loaded_two);
      Gradients sums{
          exchange(low.weight, high.weight, keep_high), exchange(low.x, high.x, keep_high),
          exchange(low.y, high.y, keep_high)};
#pragma unroll
      for (int step = 2; step < kLanes; step *= 2) {
        sums.weight += __shfl_xor_sync(kWarp, sums.weight, step);
        sums.x += __shfl_xor_sync(kWarp, sums.x, step);
        sums.y += __shfl_xor_sync(kWarp, sums.y, step);
      }
      if (j == (lane & ~1)) mine = sums;
      add(j, one, loaded_one.grad);
      add(j + 1, two, loaded_two.grad);
    }
    if constexpr (kCollect == Collect::kRegisters) {
      write_column(0);
      write_column(1);
    }
    return mine;
  }
};

// Loads `count` numbers at `from`, as one vector of 16 bytes if `whole`.
__device__ __forceinline__ void load_chunk(const float* from, bool whole, int count, float (&out)[kChunk]) {
  if (whole) {
    load_channels(from, out);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = i < count ? __ldg(from + i) : 0.f;
  }
}
__device__ __forceinline__ void store_chunk(float* to, bool whole, int count, const float (&in)[kChunk]) {
  if (whole) {
    store_channels(to, in);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) to[i] = in[i];
    }
  }
}

// The samples of one query and head.
struct BackwardWork {
  const float* reference;  // null: the classic op
  const float* locations;
  const float* weights;
  float* grad_locations;
  float* grad_weights;
  int num_samples;
  bool active, fused;
  bool whole;  // every chunk has kChunk samples, aligned to 16 bytes
  float highest, scale;  // of the softmax

  __device__ __forceinline__ float share(float weight) const {
    return fused ? exp_of(weight - highest) * scale : weight;
  }

  __device__ __forceinline__ void find_softmax() {
    highest = -CUDART_INF_F, scale = 1.f;
    if (!fused || !active) return;
    float logits[kChunk], total = 0.f;
    for (int s = 0; s < num_samples; s += kChunk) {
      const int count = min(kChunk, num_samples - s);
      load_chunk(weights + s, whole, count, logits);
      for (int i = 0; i < kChunk; ++i) highest = i < count ? fmaxf(highest, logits[i]) : highest;
    }
    for (int s = 0; s < num_samples; s += kChunk) {
      const int count = min(kChunk, num_samples - s);
      load_chunk(weights + s, whole, count, logits);
      for (int i = 0; i < kChunk; ++i) total += i < count ? exp_of(logits[i] - highest) : 0.f;
    }
    scale = reciprocal(total);
  }

  // The weight and the position in pixels of `count` samples from `base` on.
  struct Chunk {
    float share[kChunk], x[kChunk], y[kChunk];
  };
  __device__ __forceinline__ Chunk load(int base, int count) const {
    float low[kChunk], high[kChunk];
    Chunk chunk;
    load_chunk(locations + 2 * base, whole, 2 * count, low);
    load_chunk(locations + 2 * base + kChunk, whole, 2 * count - kChunk, high);
    load_chunk(weights + base, whole, count, chunk.share);
    for (int i = 0; i < kChunk; ++i) {
      chunk.share[i] = share(chunk.share[i]);
      chunk.x[i] = i < 2 ? low[2 * i] : high[2 * i - kChunk];
      chunk.y[i] = i < 2 ? low[2 * i + 1] : high[2 * i - kChunk + 1];
    }
    return chunk;
  }
  __device__ __forceinline__ void store(
      int base, int count, const float (&weight)[kChunk], const float (&x)[kChunk], const float (&y)[kChunk]) const {
    const float low[kChunk] = {x[0], y[0], x[1], y[1]}, high[kChunk] = {x[2], y[2], x[3], y[3]};
    store_chunk(grad_locations + 2 * base, whole, 2 * count, low);
    store_chunk(grad_locations + 2 * base + kChunk, whole, 2 * count - kChunk, high);
    store_chunk(grad_weights + base, whole, count, weight);
  }

  // From gradients of the softmax's output to those of the logits.
  __device__ __forceinline__ void differentiate_softmax(float mean) const {
    for (int s = 0; s < num_samples; s += kChunk) {
      const int count = min(kChunk, num_samples - s);
      float logits[kChunk], grad[kChunk];
      load_chunk(weights + s, whole, count, logits);
      if (whole) {
        const float4 vector = *reinterpret_cast<const float4*>(grad_weights + s);
        grad[0] = vector.x, grad[1] = vector.y, grad[2] = vector.z, grad[3] = vector.w;
      } else {
        for (int i = 0; i < kChunk; ++i) grad[i] = i < count ? grad_weights[s + i] : 0.f;
      }
      for (int i = 0; i < kChunk; ++i) grad[i] = share(logits[i]) * (grad[i] - mean);
      store_chunk(grad_weights + s, whole, count, grad);
    }
  }
};

// Sums of grad_value of the block's head over a rectangle of one level, around the mean of the block's samples.
template <int kLanes>
struct Window {
  static constexpr int kChannels = 4 * kLanes;
  static constexpr int kWarps = kBackwardThreads / 32;

  float rows[kWindowHeight * kWindowWidth][kChannels];
  int slots[kChunk][kBackwardThreads];  // index in `rows` of a sample's top left corner; -1: not all of it is inside
  float sums[kWarps][3];

  __device__ __forceinline__ void clear() {
    const int lane = threadIdx.x % kLanes;
    for (int i = threadIdx.x / kLanes; i < kWindowHeight * kWindowWidth; i += kBackwardThreads / kLanes) {
      *reinterpret_cast<float4*>(rows[i] + 4 * lane) = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  // Chooses the position of the window for these cells of the block and sets their slots. Synchronises the block.
  __device__ __forceinline__ int2 place(const Cell<float> (&cells)[kChunk]) {
    const int thread = threadIdx.x;
    float x = 0.f, y = 0.f, count = 0.f;
    for (const Cell<float>& cell : cells) {
      if (cell.inside == 0) continue;
      x += static_cast<float>(cell.x);
      y += static_cast<float>(cell.y);
      count += 1.f;
    }
    x = sum_lanes<32>(x), y = sum_lanes<32>(y), count = sum_lanes<32>(count);
    if (thread % 32 == 0) {
      float* const own = sums[thread / 32];
      own[0] = x, own[1] = y, own[2] = count;
    }
    __syncthreads();
    x = 0.f, y = 0.f, count = 0.f;
    for (const float* of_warp : sums) x += of_warp[0], y += of_warp[1], count += of_warp[2];
    const float scale = 1.f / fmaxf(count, 1.f);
    const int left = static_cast<int>(floorf(x * scale)) - (kWindowWidth / 2 - 1);
    const int top = static_cast<int>(floorf(y * scale)) - (kWindowHeight / 2 - 1);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int column = cells[i].x - left, line = cells[i].y - top;
      const bool holds = cells[i].inside != 0 && column >= 0 && column + 1 < kWindowWidth && line >= 0 &&
                         line + 1 < kWindowHeight;
      slots[i][thread] = holds ? line * kWindowWidth + column : -1;
    }
    __syncwarp();
    return make_int2(left, top);
  }

  // Adds the sums to memory and clears them. `grad_value` points to this lane's channels in row 0.
  __device__ __forceinline__ void write(
      const Problem& problem, float* grad_value, int level, int head, const int2& corner) {
    const LevelSize size = problem.level[level];
    const int lane = threadIdx.x % kLanes, group = threadIdx.x % 32 / kLanes;
    for (int line = threadIdx.x / 32; line < kWindowHeight; line += kWarps) {
      for (int column = group; column < kWindowWidth; column += 32 / kLanes) {
        float4* const at = reinterpret_cast<float4*>(rows[line * kWindowWidth + column] + 4 * lane);
        const float4 sum = *at;
        if (sum.x == 0.f && sum.y == 0.f && sum.z == 0.f && sum.w == 0.f) continue;
        *at = make_float4(0.f, 0.f, 0.f, 0.f);
        const int position =
            static_cast<int>(size.start) + (corner.y + line) * size.width + corner.x + column;
        const int row = position * static_cast<int>(problem.heads) + head;
        add_channels(to_row<kChannels>(grad_value, row), {sum.x, sum.y, sum.z, sum.w});
      }
    }
  }
};

// `grad_value` may be null. kLevels and kPoints are 0 for any number of levels and points; otherwise all samples of a
// query are prepared and kept in shared memory, which saves reading logits and gradients again.
template <typename T, int kLanes, int kLevels, int kPoints, Collect kCollect>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<T, (kLevels > 0), kCollect>) backward_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ Tiles tiles,
    const Points<float> points,
    const T* __restrict__ value,
    const T* __restrict__ grad_output,
    float* grad_value,
    const PointGradients<float> gradients) {
  constexpr int kChannels = 4 * kLanes;
  constexpr bool kFixed = kLevels > 0, kWindow = kCollect == Collect::kSharedMemory;
  constexpr int kHeld = kFixed ? kLevels * kPoints : kChunk;
  static_assert(kHeld % kChunk == 0 && !(kFixed && kWindow));
  __shared__ Sample samples[kHeld][kBackwardThreads];

  const int thread = threadIdx.x;
  const int lane = thread % kLanes;
  const int heads = static_cast<int>(problem.heads);
  const int tile = tiles.by_blocks.divide(static_cast<int>(blockIdx.x));
  const int head = static_cast<int>(blockIdx.x) - tile * heads;
  const int query = tile_query<kLanes, kBackwardThreads / kLanes>(problem, tiles, tile, thread);
  const bool active = query >= 0;
  // With a window, all warps must reach the barriers of the block.
  if (!kWindow && !__any_sync(kWarp, active)) return;

  const int num_points = kFixed ? kPoints : static_cast<int>(problem.points);
  const int num_samples = kFixed ? kHeld : static_cast<int>(problem.levels) * num_points;
  const int64_t batch = blockIdx.y;
  const int existing = max(query, 0);
  const int64_t item = (batch * problem.queries + existing) * heads + head;
  BackwardWork work;
  work.reference = find_reference(problem, points, batch, existing);
  work.locations = points.locations + 2 * item * num_samples;
  work.weights = points.weights + item * num_samples;
  work.grad_locations = gradients.locations + 2 * item * num_samples;
  work.grad_weights = gradients.weights + item * num_samples;
  work.num_samples = num_samples;
  work.active = active;
  work.fused = points.reference != nullptr;
  // With a window, no chunk may contain samples of two levels.
  work.whole = kFixed || (kWindow ? num_points : num_samples) % kChunk == 0;
  work.find_softmax();

  // The queries of a run are consecutive; if the first does not exist, neither do the others.
  const int first_query = max(__shfl_sync(kWarp, query, 0, kLanes), 0);
  const int64_t image = batch * problem.values * heads * kChannels + lane * 4;
  Sweep<T, kLanes, kCollect> sweep;
  sweep.value = opaque(value + image);
  sweep.grad_output =
      opaque(grad_output + ((batch * problem.queries + first_query) * heads + head) * kChannels + lane * 4);
  sweep.adds = grad_value != nullptr;
  sweep.grad_value = opaque(sweep.adds ? grad_value + image : nullptr);
  sweep.heads = heads;
  sweep.lane = lane;

  Window<kLanes>* window = nullptr;
  if constexpr (kWindow) {
    __shared__ __align__(16) Window<kLanes> shared_window;
    window = &shared_window;
    window->clear();
    sweep.window = window->rows[0] + lane * 4;
  }

  float mean = 0.f;  // weighted mean of the weight gradients, which the softmax subtracts
  int count = kHeld;
  for (int base = 0; base < num_samples; base += count) {
    if (!kFixed) count = min(kChunk, kWindow ? num_points - base % num_points : num_samples - base);
    [[maybe_unused]] int2 corner;
#pragma unroll
    for (int first = 0; first < kHeld; first += kChunk) {
      BackwardWork::Chunk chunk;
      if (active) chunk = work.load(base + first, kFixed ? kChunk : count);
      Cell<float> cells[kChunk] = {};
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        Sample sample{0.f, 0.f, 0.f, 0};
        if (active && (kFixed || i < count)) {
          const int level = (base + first + i) / num_points;
          const LevelSize size = problem.level[level];
          to_pixels(problem, work.reference, level, chunk.x[i], chunk.y[i]);
          cells[i] = find_cell(chunk.x[i], chunk.y[i], size.height, size.width);
          sample = make_sample(problem, cells[i], chunk.share[i], level, head);
          sample.weight = chunk.share[i];
        }
        samples[first + i][thread] = sample;
      }
      if constexpr (kWindow) corner = window->place(cells);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const LevelSize size = problem.level[(base + i) / num_points];
      sweep.samples = samples[i] + (thread - lane);
      if constexpr (kWindow) sweep.slots = window->slots[i] + (thread - lane);
      sweep.row_step = size.width * heads;
      const Gradients sums = sweep.run();
      __syncwarp();
      // This lane's sample is no longer needed; its gradients and its weight take its place.
      Sample& own = samples[i][thread];
      const float share = own.weight;
      if (own.cell != 0) {
        mean += share * sums.weight;
        const float slope_x = work.fused ? share : share * static_cast<float>(size.width);
        const float slope_y = work.fused ? share : share * static_cast<float>(size.height);
        own = {sums.weight, slope_x * sums.x, slope_y * sums.y, static_cast<int>(__float_as_uint(share))};
      } else {
        own = {0.f, 0.f, 0.f, static_cast<int>(__float_as_uint(share))};
      }
    }
    if constexpr (kWindow) {
      __syncthreads();
      window->write(problem, sweep.grad_value, base / num_points, head, corner);
    }
#pragma unroll
    for (int first = 0; first < kHeld; first += kChunk) {
      if (!active) continue;
      float weight[kChunk], x[kChunk], y[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const Sample own = samples[first + i][thread];
        const float share = __uint_as_float(static_cast<unsigned>(own.cell));
        weight[i] = kFixed && work.fused ? share * (own.weight - mean) : own.weight;
        x[i] = own.fx;
        y[i] = own.fy;
      }
      work.store(base + first, kFixed ? kChunk : count, weight, x, y);
    }
    __syncwarp();
  }
  if (!kFixed && work.fused && active) work.differentiate_softmax(mean);
}
}  // namespace mask2former::cuda
