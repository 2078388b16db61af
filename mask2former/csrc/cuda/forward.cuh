// Fast forward: D/V lanes process one head of one query, V = 16 bytes / size of a channel.
//
// A block holds 8 x 4 queries (for 16-bit types, of two heads whose rows share a cache line), so that neighbouring
// queries find the corners of a sample in L1. Each lane of a head prepares one sample (position, softmax, cell) and
// stores it in shared memory, from which all lanes read it with one 128-bit load.
//
// Cost per sample of a whole warp, away from borders, for float and D = 32 (4 heads per warp): 4 loads of 512 bytes, 16
// L1 wavefronts, and 5 for reading the sample; 47 instructions in the loop, 16 of them FMA, and about 15 for preparing
// samples. With 4 issue slots per cycle that takes 16 cycles: L1 and instruction issue limit equally. bfloat16 (8 heads
// per warp) has the same wavefronts for twice the heads and 95 instructions, 32 of them conversions. The original
// kernel needs 4 wavefronts and about 80 instructions per sample and head.

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

// Adds `count` samples to `sum`. `value` points to this lane's channels in row 0; `row_steps` is the number of rows
// between lines of the level.
template <typename T, int kLanes, bool kInterior>
__device__ __forceinline__ void add_samples(
    float (&sum)[16 / sizeof(T)], const T* value, const Sample* samples, const int* row_steps, int count, int heads) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kChannels = kLanes * kVector;
#pragma unroll 2
  for (int j = 0; j < count; ++j) {
    const Sample sample = samples[j];
    const int row = sample.cell >> 4;
    const int below = row + row_steps[j];
    const T* corner[4] = {
        to_row<kChannels>(value, row), to_row<kChannels>(value, row + heads), to_row<kChannels>(value, below),
        to_row<kChannels>(value, below + heads)};
    const float bottom = sample.weight * sample.fy;
    const float top = sample.weight - bottom;
    const float share[4] = {top - top * sample.fx, top * sample.fx, bottom - bottom * sample.fx, bottom * sample.fx};
    float values[4][kVector];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      constexpr int kNeeded[4] = {kTop | kLeft, kTop | kRight, kBottom | kLeft, kBottom | kRight};
      const bool inside = kInterior || (sample.cell & kNeeded[c]) == kNeeded[c];
      if (!kInterior) {
        for (int i = 0; i < kVector; ++i) values[c][i] = 0.f;
      }
      if (inside) load_channels(corner[c], values[c]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += share[c] * values[c][i];
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 4 : 3) forward_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ Tiles tiles,
    const Points<float> points,
    const T* __restrict__ value,
    T* __restrict__ output) {
  using Shape = ForwardShape<T, kLanes>;
  constexpr int kVector = Shape::kVector;
  constexpr int kChannels = kLanes * kVector;
  __shared__ Sample samples[Shape::kThreads];
  __shared__ int row_steps[Shape::kThreads];

  const int thread = threadIdx.x;
  const int lane = thread % kLanes;
  const int group = thread / kLanes;
  const int heads = static_cast<int>(problem.heads);
  const int head_blocks = (heads + Shape::kHeads - 1) / Shape::kHeads;
  const int tile = static_cast<int>(blockIdx.x) / head_blocks;
  const int head = (static_cast<int>(blockIdx.x) - tile * head_blocks) * Shape::kHeads + group % Shape::kHeads;
  const int query = tile_query(problem, tiles, tile, group / Shape::kHeads);
  const bool active = query >= 0 && head < heads;
  if (!__any_sync(kWarp, active)) return;

  const int num_samples = active ? static_cast<int>(problem.levels * problem.points) : 0;
  const int rounds_end = static_cast<int>(problem.levels * problem.points);
  const int num_points = static_cast<int>(problem.points);
  const int64_t batch = blockIdx.y;
  const int64_t item = active ? (batch * problem.queries + query) * heads + head : 0;
  const int64_t reference_query = problem.per_image_reference ? batch * problem.queries + query : query;
  const float2* locations = reinterpret_cast<const float2*>(points.locations) + item * rounds_end;
  const float* weights = points.weights + item * rounds_end;
  value += batch * problem.values * heads * kChannels + lane * kVector;
  const bool fused = points.reference != nullptr;

  // Weights are normalised at the end; `total` is this lane's part of the sum of exponentials.
  float highest = -CUDART_INF_F, total = 0.f;
  if (fused) {
    for (int s = lane; s < num_samples; s += kLanes) highest = fmaxf(highest, __ldg(weights + s));
    highest = max_lanes<kLanes>(highest);
  }

  float sum[kVector] = {};
  float2 location = make_float2(0.f, 0.f);
  float weight = 0.f;
  if (lane < num_samples) {
    location = __ldg(locations + lane);
    weight = __ldg(weights + lane);
  }
  for (int base = 0; base < rounds_end; base += kLanes) {
    const int s = base + lane;
    Sample sample{0.f, 0.f, 0.f, 0};
    if (s < num_samples) {
      const int level = s / num_points;
      float x = location.x, y = location.y;
      to_pixels(problem, points.reference, reference_query, level, x, y);
      if (fused) {
        weight = exp_of(weight - highest);
        total += weight;
      }
      sample = make_sample(problem, x, y, weight, level, head);
      row_steps[thread] = problem.level[level].width * heads;
    }
    samples[thread] = sample;
    if (s + kLanes < num_samples) {  // prefetch the next round
      location = __ldg(locations + s + kLanes);
      weight = __ldg(weights + s + kLanes);
    }
    const bool interior = __all_sync(kWarp, s >= rounds_end || (sample.cell & kAll) == kAll);
    __syncwarp();
    const int count = min(kLanes, rounds_end - base);
    const Sample* from = samples + (thread - lane);
    if (interior) {
      add_samples<T, kLanes, true>(sum, value, from, row_steps + (thread - lane), count, heads);
    } else if (active) {
      add_samples<T, kLanes, false>(sum, value, from, row_steps + (thread - lane), count, heads);
    }
    __syncwarp();
  }
  if (fused) {
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
    const int64_t reference_query = problem.per_image_reference ? query : query % problem.queries;
    const A* locations = points.locations + item * num_samples * 2;
    const A* weights = points.weights + item * num_samples;
    const T* image = value + query / problem.queries * problem.values * row + i % row;
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
      to_pixels(problem, points.reference, reference_query, level, x, y);
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
