// Fast forward: D/V lanes process one head of one query, V = 16 bytes / size of a channel.
//
// A block holds 8 x 4 queries (for 16-bit types, of two heads whose rows share a cache line), so that neighbouring
// queries find the corners of a sample in L1. The lanes of a head prepare its samples (position, softmax, cell, weights
// of the corners) and store them in shared memory, from which all lanes read them. The usual 3 x 4 and 4 x 4 samples
// are prepared all at once, any other number in rounds of one per lane.
//
// Instructions per sample of a whole warp, counted in the code of nvcc 13.0 for compute capability 9.0, away from
// borders, for 3 x 4 samples and D = 32: 69 for float (4 heads per warp) and 125 for 16-bit types (8 heads), of which
// the loop over samples is 29 (16 FMA, 4 loads, 4 addresses) and 77 (32 FMA, 32 conversions); in rounds the loop is 33
// and 81. A lane loads 16 bytes of each corner: 16 L1 wavefronts per sample, and 1.25 from shared memory. By these
// numbers float is limited by issue (4 slots per cycle) and L1 (one wavefront per cycle) alike, 16-bit types by issue;
// neither has been measured.

#pragma once

#include "common.cuh"

namespace mask2former::cuda {

template <typename T, int kLanes>
struct ForwardShape {
  static constexpr int kThreads = 256;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kHeads = kLanes < 8 ? 8 / kLanes : 1;  // consecutive heads, 128 bytes together
  static constexpr int kTileWidth = 8;
  static constexpr int kTileHeight = kThreads / (kLanes * kHeads * kTileWidth);
};

// The samples of one query and head, and where its lanes find their channels.
template <typename T>
struct ForwardWork {
  const float* reference;  // of the query; null: the classic op
  const float2* locations;
  const float* weights;
  const T* value;  // this lane's channels in row 0
  unsigned lane;
  int head;
  bool active;
};

// A sample ready to be summed: the weights of its corners, and 16 times the row of its top left corner (position * M +
// head) plus one bit for each corner inside the level.
struct Corners {
  float4 share;
  int cell;
};

template <typename T>
__device__ __forceinline__ Corners
prepare(const Problem& problem, const ForwardWork<T>& work, int level, float2 location, float weight) {
  to_pixels(problem, work.reference, level, location.x, location.y);
  const LevelSize size = problem.level[level];
  const Cell<float> cell = find_cell(location.x, location.y, size.height, size.width);
  const Sample sample = make_sample(problem, cell, weight, level, work.head);
  const float bottom = sample.weight * sample.fy;
  const float top = sample.weight - bottom;
  const int columns = sample.cell & kColumns;
  const int corners = (sample.cell & kTop ? columns : 0) | (sample.cell & kBottom ? columns << 2 : 0);
  return {
      make_float4(top - top * sample.fx, top * sample.fx, bottom - bottom * sample.fx, bottom * sample.fx),
      (sample.cell & ~kAll) | corners};
}

// Adds a sample. `corner` points to this lane's channels of the corners of row 0.
template <int kChannels, bool kInterior, int kVector, typename T>
__device__ __forceinline__ void add_sample(
    float (&sum)[kVector], const T* const (&corner)[4], const float4& shares, int cell) {
  const float share[4] = {shares.x, shares.y, shares.z, shares.w};
  const int row = cell >> 4;
  float values[4][kVector];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (!kInterior) {
      for (int i = 0; i < kVector; ++i) values[c][i] = 0.f;
    }
    if (kInterior || (cell & 1 << c)) load_channels(to_row<kChannels>(corner[c], row), values[c]);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += share[c] * values[c][i];
  }
}

// Sets the lower corners for a level whose lines are `row_step` rows apart.
template <int kChannels, typename T>
__device__ __forceinline__ void set_lower(const T* (&corner)[4], int row_step) {
  corner[2] = opaque(to_row<kChannels>(corner[0], row_step));
  corner[3] = opaque(to_row<kChannels>(corner[1], row_step));
}

// Sums kLevels * kPoints samples. All are prepared before the first is summed. Returns this lane's part of the sum of
// exponentials, by which the caller divides.
template <int kLanes, int kLevels, int kPoints, int kThreads, int kVector, typename T>
__device__ __forceinline__ float sum_fixed(
    const Problem& problem, const ForwardWork<T>& work, float (&sum)[kVector]) {
  constexpr int kChannels = kLanes * kVector, kGroups = 32 / kLanes;
  constexpr int kSamples = kLevels * kPoints, kRounds = (kSamples + kLanes - 1) / kLanes;
  // Samples of the groups of a warp are neighbours: all groups read theirs in one wavefront.
  __shared__ float4 shares[kThreads / 32][kSamples][kGroups];
  __shared__ __align__(16) int cells[kThreads / 32][kLevels][kGroups][kPoints];
  const unsigned warp = threadIdx.x / 32, group = threadIdx.x % 32 / kLanes;

  float2 location[kRounds];
  float weight[kRounds];
  float highest = -CUDART_INF_F, total = 0.f;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const unsigned s = r * kLanes + work.lane;
    location[r] = make_float2(0.f, 0.f);
    weight[r] = -CUDART_INF_F;
    if (work.active && s < kSamples) {
      location[r] = __ldg(work.locations + s);
      weight[r] = __ldg(work.weights + s);
    }
    highest = fmaxf(highest, weight[r]);
  }
  if (work.reference != nullptr) highest = max_lanes<kLanes>(highest);

  unsigned border_levels = 0;  // bit l: a sample of level l has corners outside, or the warp has idle lanes
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const unsigned s = r * kLanes + work.lane;
    Corners corners{make_float4(0.f, 0.f, 0.f, 0.f), 0};
    if (work.active && s < kSamples) {
      if (work.reference != nullptr) {
        weight[r] = exp_of(weight[r] - highest);
        total += weight[r];
      }
      corners = prepare(problem, work, s / kPoints, location[r], weight[r]);
    }
    if (s < kSamples) {
      shares[warp][s][group] = corners.share;
      cells[warp][s / kPoints][group][s % kPoints] = corners.cell;
    }
    const unsigned at_border = __ballot_sync(kWarp, (corners.cell & kAll) != kAll);
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      // The lanes that prepared samples of this level.
      const int begin = max(level * kPoints - r * kLanes, 0), end = min((level + 1) * kPoints - r * kLanes, kLanes);
      if (begin >= end) continue;
      const unsigned lanes = ((1u << end) - (1u << begin)) * (kWarp / ((1u << kLanes) - 1u));
      if (at_border & lanes) border_levels |= 1u << level;
    }
  }
  __syncwarp();

  // Half of a level at a time: with more loads in flight registers are spilled.
  constexpr int kUnroll = kPoints / 2;
  const int heads = static_cast<int>(problem.heads);
  const T* corner[4] = {opaque(work.value), opaque(to_row<kChannels>(work.value, heads))};
#pragma unroll
  for (int level = 0; level < kLevels; ++level) {
    set_lower<kChannels>(corner, problem.level[level].width * heads);
    const float4* const share = &shares[warp][level * kPoints][group];
    const int* const cell = cells[warp][level][group];
    if (!(border_levels & 1u << level)) {
#pragma unroll kUnroll
      for (int p = 0; p < kPoints; ++p) add_sample<kChannels, true>(sum, corner, share[p * kGroups], cell[p]);
    } else if (work.active) {
#pragma unroll 1
      for (int p = 0; p < kPoints; ++p) add_sample<kChannels, false>(sum, corner, share[p * kGroups], cell[p]);
    }
  }
  return total;
}

// The same for any number of samples: kLanes at a time.
template <int kLanes, int kThreads, int kVector, typename T>
__device__ __forceinline__ float sum_any(
    const Problem& problem, const ForwardWork<T>& work, float (&sum)[kVector]) {
  constexpr int kChannels = kLanes * kVector, kGroups = 32 / kLanes;
  struct Shared {
    float4 share[kLanes][kGroups];
    int2 cell[kLanes][kGroups];  // and the number of rows between lines of the level
  };
  __shared__ Shared shared[kThreads / 32];
  Shared& own = shared[threadIdx.x / 32];
  const int lane = static_cast<int>(work.lane);
  const unsigned group = threadIdx.x % 32 / kLanes;
  const int heads = static_cast<int>(problem.heads), num_points = static_cast<int>(problem.points);
  const int end = static_cast<int>(problem.levels) * num_points;
  const int num_samples = work.active ? end : 0;

  float highest = -CUDART_INF_F, total = 0.f;
  if (work.reference != nullptr) {
    for (int s = lane; s < num_samples; s += kLanes) highest = fmaxf(highest, __ldg(work.weights + s));
    highest = max_lanes<kLanes>(highest);
  }
  float2 location = make_float2(0.f, 0.f);
  float weight = 0.f;
  if (lane < num_samples) {
    location = __ldg(work.locations + lane);
    weight = __ldg(work.weights + lane);
  }
  const T* corner[4] = {opaque(work.value), opaque(to_row<kChannels>(work.value, heads))};
  for (int base = 0; base < end; base += kLanes) {
    const int s = base + lane;
    Corners corners{make_float4(0.f, 0.f, 0.f, 0.f), 0};
    int row_step = 0;
    if (s < num_samples) {
      const int level = s / num_points;
      if (work.reference != nullptr) {
        weight = exp_of(weight - highest);
        total += weight;
      }
      corners = prepare(problem, work, level, location, weight);
      row_step = problem.level[level].width * heads;
    }
    own.share[lane][group] = corners.share;
    own.cell[lane][group] = make_int2(corners.cell, row_step);
    if (s + kLanes < num_samples) {  // prefetch the next round
      location = __ldg(work.locations + s + kLanes);
      weight = __ldg(work.weights + s + kLanes);
    }
    const bool interior = __all_sync(kWarp, s >= end || (corners.cell & kAll) == kAll);
    __syncwarp();
    const int count = min(kLanes, end - base);
    if (interior) {
#pragma unroll 2
      for (int j = 0; j < count; ++j) {
        const int2 cell = own.cell[j][group];
        set_lower<kChannels>(corner, cell.y);
        add_sample<kChannels, true>(sum, corner, own.share[j][group], cell.x);
      }
    } else if (work.active) {
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        const int2 cell = own.cell[j][group];
        set_lower<kChannels>(corner, cell.y);
        add_sample<kChannels, false>(sum, corner, own.share[j][group], cell.x);
      }
    }
    __syncwarp();
  }
  return total;
}

// kLevels and kPoints are 0 for any number of levels and points.
template <typename T, int kLanes, int kLevels, int kPoints>
__global__ void __launch_bounds__(ForwardShape<T, kLanes>::kThreads, sizeof(T) == 4 ? 4 : 3) forward_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ Tiles tiles,
    const Points<float> points,
    const T* __restrict__ value,
    T* __restrict__ output) {
  using Shape = ForwardShape<T, kLanes>;
  constexpr int kVector = Shape::kVector, kChannels = kLanes * kVector;
  const unsigned lane = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  const int heads = static_cast<int>(problem.heads);
  const int tile = tiles.by_blocks.divide(static_cast<int>(blockIdx.x));
  const int head = (static_cast<int>(blockIdx.x) - tile * tiles.blocks) * Shape::kHeads + group % Shape::kHeads;
  const int query =
      tile_query<Shape::kTileWidth, Shape::kTileHeight>(problem, tiles, tile, group / Shape::kHeads);
  const bool active = query >= 0 && head < heads;
  if (!__any_sync(kWarp, active)) return;

  const int num_samples = kLevels > 0 ? kLevels * kPoints : static_cast<int>(problem.levels * problem.points);
  const int64_t batch = blockIdx.y;
  const int64_t item = active ? (batch * problem.queries + query) * heads + head : 0;
  ForwardWork<T> work;
  work.reference = find_reference(problem, points, batch, max(query, 0));
  work.locations = reinterpret_cast<const float2*>(points.locations) + item * num_samples;
  work.weights = points.weights + item * num_samples;
  work.value = value + batch * problem.values * heads * kChannels + lane * kVector;
  work.lane = lane;
  work.head = head;
  work.active = active;

  float sum[kVector] = {}, total;
  if constexpr (kLevels > 0) {
    total = sum_fixed<kLanes, kLevels, kPoints, Shape::kThreads>(problem, work, sum);
  } else {
    total = sum_any<kLanes, Shape::kThreads>(problem, work, sum);
  }
  if (points.reference != nullptr) {
    const float scale = reciprocal(sum_lanes<kLanes>(total));
    for (int i = 0; i < kVector; ++i) sum[i] *= scale;
  }
  if (active) store_channels(output + item * kChannels + lane * kVector, sum);
}

// General forward: one thread per output channel.
template <typename T>
__global__ void __launch_bounds__(256) forward_general_kernel(
    const __grid_constant__ Problem problem,
    const Points<typename Accumulate<T>::type> points,
    const T* __restrict__ value,
    T* __restrict__ output) {
  using A = typename Accumulate<T>::type;
  const int64_t num_samples = problem.levels * problem.points;
  const int64_t row = problem.heads * problem.channels;
  const int64_t end = problem.batch * problem.queries * row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += step) {
    const int64_t item = i / problem.channels;
    const int64_t query = item / problem.heads;
    const int64_t batch = query / problem.queries;
    const A* reference = find_reference(problem, points, batch, query % problem.queries);
    const A* locations = points.locations + item * num_samples * 2;
    const A* weights = points.weights + item * num_samples;
    const T* image = value + batch * problem.values * row + i % row;
    A highest = -CUDART_INF_F, total = 0;
    if (points.reference != nullptr) {
      for (int64_t s = 0; s < num_samples; ++s) highest = weights[s] > highest ? weights[s] : highest;
      for (int64_t s = 0; s < num_samples; ++s) total += exp_of(weights[s] - highest);
    }
    A sum = 0;
    for (int64_t s = 0; s < num_samples; ++s) {
      const int level = static_cast<int>(s / problem.points);
      const LevelSize size = problem.level[level];
      A x = locations[2 * s], y = locations[2 * s + 1];
      to_pixels(problem, reference, level, x, y);
      const Cell<A> cell = find_cell(x, y, size.height, size.width);
      const A weight = points.reference != nullptr ? exp_of(weights[s] - highest) / total : weights[s];
      const T* corner = image + (size.start + static_cast<int64_t>(cell.y) * size.width + cell.x) * row;
      const A bottom = weight * cell.fy, top = weight - bottom;
      const int inside = cell.inside;
      if ((inside & kTop) && (inside & kLeft)) sum += (top - top * cell.fx) * widen(corner[0]);
      if ((inside & kTop) && (inside & kRight)) sum += top * cell.fx * widen(corner[row]);
      corner += static_cast<int64_t>(size.width) * row;
      if ((inside & kBottom) && (inside & kLeft)) sum += (bottom - bottom * cell.fx) * widen(corner[0]);
      if ((inside & kBottom) && (inside & kRight)) sum += bottom * cell.fx * widen(corner[row]);
    }
    narrow(sum, output[i]);
  }
}

}  // namespace mask2former::cuda
