// Fast backward: D/4 lanes process one head for D/4 consecutive queries.
//
// The bottleneck is the number of grad_value rows added to in L2: 4 per sample, 1 GB for one 1024 x 1024 image. The
// lanes therefore process the same sample (level and point) of consecutive queries, and accumulate the 4 corners of the
// current cell in registers. The next query usually falls into the same cell, and nothing is written, or into the cell
// to its right, and only the left column is written. For smooth offsets this saves half of the additions if queries and
// sampled level have the same resolution, and three quarters or more if the level is coarser. For random offsets it
// costs a few instructions per sample.
//
// Lane j prepares the samples of query j and receives their gradients, 3 sums over the lanes per query. Two queries are
// processed at a time: their loads overlap and they share shuffles (neighbouring lanes exchange, even lanes keep the
// first query), 4.5 per query instead of 9 for D = 32. Sums are always fp32.
//
// Cost per sample of a whole warp for D = 32 (4 heads per warp): 4 + 1 loads of 4 channels per lane, 16 L1 wavefronts
// for the values (8 for 16-bit types), 4.5 shuffles and about 170 instructions, 50 of them floating point; at most 4
// vector atomics (4 times as many scalar ones before compute capability 9.0). The original kernel needs block barriers
// and 96 dependent additions in a single thread for every sample of every head.

#pragma once

#include "common.cuh"

namespace mask2former::cuda {

constexpr int kBackwardThreads = 128;
constexpr int kChunk = 4;  // samples prepared at a time

// Target blocks per multiprocessor: as many as fit without spilling registers.
template <typename T>
constexpr int kBackwardBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    4;
#else
    sizeof(T) == 4 ? 4 : 5;
#endif

// Sums over channels of grad_output times the sample and times its derivatives in x and y, for a weight of one.
struct Gradients {
  float weight, x, y;
};

// Sums over a pair of lanes: the first lane gets the sum of `low`, the second that of `high`.
__device__ __forceinline__ float exchange(float low, float high, bool keep_high) {
  const float received = __shfl_xor_sync(kWarp, keep_high ? low : high, 1);
  return (keep_high ? high : low) + received;
}

// Processes one sample of each query of the run, in order.
template <typename T, int kLanes>
struct Sweep {
  static constexpr int kChannels = 4 * kLanes;

  const Sample* samples;  // of the run's queries
  const T* value;         // this lane's channels in row 0
  const T* grad_output;   // this lane's channels of the first query
  float* grad_value;      // this lane's channels in row 0; null if not needed
  int heads, row_step, lane;

  int cell = 0;  // the cell that `sum` belongs to, as Sample::cell
  float sum[4][4];

  __device__ __forceinline__ void clear(int corner) {
    for (int i = 0; i < 4; ++i) sum[corner][i] = 0.f;
  }

  // Adds column 0 or 1 of the cell to memory.
  __device__ __forceinline__ void write_column(int column) {
    if (grad_value == nullptr || !(cell & (column == 0 ? kLeft : kRight))) return;
    const int row = (cell >> 4) + column * heads;
    if (cell & kTop) add_channels(to_row<kChannels>(grad_value, row), sum[column]);
    if (cell & kBottom) add_channels(to_row<kChannels>(grad_value, row + row_step), sum[2 + column]);
  }

  __device__ __forceinline__ void move_to(int next) {
    if (next == cell || next == 0) return;
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

  __device__ __forceinline__ void add(const Sample& sample, const Four<T>& loaded) {
    move_to(sample.cell);
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
      add(one, loaded_one.grad);
      add(two, loaded_two.grad);
    }
    write_column(0);
    write_column(1);
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

// `grad_value` may be null.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<T>) backward_kernel(
    const __grid_constant__ Problem problem,
    const __grid_constant__ Tiles tiles,
    const Points<float> points,
    const T* __restrict__ value,
    const T* __restrict__ grad_output,
    float* grad_value,
    const PointGradients<float> gradients) {
  constexpr int kChannels = 4 * kLanes;
  __shared__ Sample samples[kChunk][kBackwardThreads];

  const int thread = threadIdx.x;
  const int lane = thread % kLanes;
  const int heads = static_cast<int>(problem.heads);
  const int tile = tiles.by_blocks.divide(static_cast<int>(blockIdx.x));
  const int head = static_cast<int>(blockIdx.x) - tile * heads;
  const int query = tile_query<kLanes, kBackwardThreads / kLanes>(problem, tiles, tile, thread);
  const bool active = query >= 0;
  if (!__any_sync(kWarp, active)) return;

  const int num_samples = static_cast<int>(problem.levels * problem.points);
  const int num_points = static_cast<int>(problem.points);
  const int64_t batch = blockIdx.y;
  const int64_t item = (batch * problem.queries + (active ? query : 0)) * heads + head;
  const float* reference = find_reference(problem, points, batch, query);
  const int64_t first_sample = item * num_samples;
  const bool fused = points.reference != nullptr;
  const bool aligned = num_samples % kChunk == 0;

  // The queries of a run are consecutive; if the first does not exist, neither do the others.
  const int first_query = max(__shfl_sync(kWarp, query, 0, kLanes), 0);
  const int64_t image = batch * problem.values * heads * kChannels + lane * 4;
  Sweep<T, kLanes> sweep;
  sweep.value = value + image;
  sweep.grad_output = grad_output + ((batch * problem.queries + first_query) * heads + head) * kChannels + lane * 4;
  sweep.grad_value = grad_value == nullptr ? nullptr : grad_value + image;
  sweep.heads = heads;
  sweep.lane = lane;

  float highest = -CUDART_INF_F, scale = 1.f;
  if (fused && active) {
    float total = 0.f;
    const float* logits = points.weights + first_sample;
    for (int s = 0; s < num_samples; ++s) highest = fmaxf(highest, __ldg(logits + s));
    for (int s = 0; s < num_samples; ++s) total += exp_of(__ldg(logits + s) - highest);
    scale = reciprocal(total);
  }

  float mean = 0.f;  // weighted mean of the weight gradients, which the softmax subtracts
  for (int base = 0; base < num_samples; base += kChunk) {
    const int count = min(kChunk, num_samples - base);
    float x[kChunk], y[kChunk], weight[kChunk];
    if (active) {
      float low[kChunk], high[kChunk];
      const float* locations = points.locations + 2 * (first_sample + base);
      load_chunk(locations, aligned, 2 * count, low);
      load_chunk(locations + kChunk, aligned, 2 * count - kChunk, high);
      load_chunk(points.weights + first_sample + base, aligned, count, weight);
      x[0] = low[0], y[0] = low[1], x[1] = low[2], y[1] = low[3];
      x[2] = high[0], y[2] = high[1], x[3] = high[2], y[3] = high[3];
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      Sample sample{0.f, 0.f, 0.f, 0};
      if (active && i < count) {
        const int level = (base + i) / num_points;
        to_pixels(problem, reference, level, x[i], y[i]);
        const float share = fused ? exp_of(weight[i] - highest) * scale : weight[i];
        sample = make_sample(problem, x[i], y[i], share, level, head);
      }
      samples[i][thread] = sample;
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const LevelSize size = problem.level[(base + i) / num_points];
      sweep.samples = samples[i] + (thread - lane);
      sweep.row_step = size.width * heads;
      const Gradients sums = sweep.run();
      __syncwarp();
      // This lane's sample is no longer needed; its gradients take its place.
      Sample& own = samples[i][thread];
      if (own.cell != 0) {
        mean += own.weight * sums.weight;
        const float slope_x = fused ? own.weight : own.weight * static_cast<float>(size.width);
        const float slope_y = fused ? own.weight : own.weight * static_cast<float>(size.height);
        own = {sums.weight, slope_x * sums.x, slope_y * sums.y, 0};
      }
    }
    if (active) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const Sample own = samples[i][thread];
        weight[i] = own.weight;
        x[i] = own.fx;
        y[i] = own.fy;
      }
      const float low[kChunk] = {x[0], y[0], x[1], y[1]}, high[kChunk] = {x[2], y[2], x[3], y[3]};
      float* locations = gradients.locations + 2 * (first_sample + base);
      store_chunk(locations, aligned, 2 * count, low);
      store_chunk(locations + kChunk, aligned, 2 * count - kChunk, high);
      store_chunk(gradients.weights + first_sample + base, aligned, count, weight);
    }
    __syncwarp();
  }
  if (fused && active) {
    for (int64_t s = first_sample; s < first_sample + num_samples; ++s) {
      gradients.weights[s] = exp_of(__ldg(points.weights + s) - highest) * scale * (gradients.weights[s] - mean);
    }
  }
}

}  // namespace mask2former::cuda
