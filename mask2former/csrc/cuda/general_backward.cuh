// General backward: one warp per query and head. Also grad_value without atomics, for deterministic gradients.

#pragma once

#include "common.cuh"

namespace mask2former::cuda {

template <typename A>
__device__ __forceinline__ A sum_warp(A value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
  return value;
}

// Maximum logit and sum of exponentials; 0 and 1 for the classic op.
template <typename A>
struct Softmax {
  A highest = 0, total = 1;

  __device__ Softmax(const Points<A>& points, const A* logits, int64_t count) {
    if (points.reference == nullptr) return;
    highest = -CUDART_INF_F;
    total = 0;
    for (int64_t s = 0; s < count; ++s) highest = logits[s] > highest ? logits[s] : highest;
    for (int64_t s = 0; s < count; ++s) total += exp_of(logits[s] - highest);
  }
};

// `grad_value` may be null.
template <typename T>
__global__ void __launch_bounds__(128) backward_general_kernel(
    const __grid_constant__ Problem problem,
    const Points<typename Accumulate<T>::type> points,
    const T* __restrict__ value,
    const T* __restrict__ grad_output,
    typename Accumulate<T>::type* grad_value,
    const PointGradients<typename Accumulate<T>::type> gradients) {
  using A = typename Accumulate<T>::type;
  const int lane = threadIdx.x % 32;
  const bool fused = points.reference != nullptr;
  const int64_t num_samples = problem.levels * problem.points;
  const int64_t row = problem.heads * problem.channels;
  const int64_t items = problem.batch * problem.queries * problem.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; item < items;
       item += step) {
    const int64_t query = item / problem.heads;
    const int64_t batch = query / problem.queries;
    const A* reference = find_reference(problem, points, batch, query % problem.queries);
    const A* locations = points.locations + item * num_samples * 2;
    const A* weights = points.weights + item * num_samples;
    A* grad_locations = gradients.locations + item * num_samples * 2;
    A* grad_weights = gradients.weights + item * num_samples;
    const int64_t image = batch * problem.values * row + item % problem.heads * problem.channels;
    const Softmax<A> softmax(points, weights, num_samples);
    const A scale = A(1) / softmax.total;
    A mean = 0;
    int level = 0;
    int64_t point = 0;  // within the level
    for (int64_t s = 0; s < num_samples; ++s) {
      const LevelSize size = problem.level[level];
      A x = locations[2 * s], y = locations[2 * s + 1];
      to_pixels(problem, reference, level, x, y);
      if (++point == problem.points) {
        point = 0;
        ++level;
      }
      const Cell<A> cell = find_cell(x, y, size.height, size.width);
      const A weight = fused ? exp_of(weights[s] - softmax.highest) * scale : weights[s];
      A product[4] = {};
      const int64_t first = image + (size.start + static_cast<int64_t>(cell.y) * size.width + cell.x) * row;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int needed = (c & 1 ? kRight : kLeft) | (c & 2 ? kBottom : kTop);
        if ((cell.inside & needed) != needed) continue;
        const int64_t corner = first + ((c & 2 ? size.width : 0) + int64_t{c & 1}) * row;
        const A share = weight * (c & 1 ? cell.fx : 1 - cell.fx) * (c & 2 ? cell.fy : 1 - cell.fy);
        for (int64_t d = lane; d < problem.channels; d += 32) {
          const A grad = widen(grad_output[item * problem.channels + d]);
          product[c] += grad * widen(value[corner + d]);
          if (grad_value != nullptr) atomicAdd(grad_value + corner + d, share * grad);
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) product[c] = sum_warp(product[c]);
      const A along_top = product[1] - product[0], along_bottom = product[3] - product[2];
      const A at_top = product[0] + cell.fx * along_top, down = product[2] + cell.fx * along_bottom - at_top;
      const A along = along_top + cell.fy * (along_bottom - along_top), at = at_top + cell.fy * down;
      const bool counts = cell.inside != 0;
      if (counts) mean += weight * at;
      if (lane == 0) {
        grad_locations[2 * s] = counts ? weight * along * (fused ? A(1) : A(size.width)) : A(0);
        grad_locations[2 * s + 1] = counts ? weight * down * (fused ? A(1) : A(size.height)) : A(0);
        grad_weights[s] = counts ? at : A(0);
      }
    }
    __syncwarp();
    for (int64_t s = lane; fused && s < num_samples; s += 32) {
      grad_weights[s] = exp_of(weights[s] - softmax.highest) * scale * (grad_weights[s] - mean);
    }
  }
}

// Computes positions in pixels and weights of all samples for deterministic_kernel.
template <typename A>
__global__ void __launch_bounds__(256) expand_points_kernel(
    const __grid_constant__ Problem problem, const Points<A> points, A* pixels, A* shares) {
  const int64_t num_samples = problem.levels * problem.points;
  const int64_t items = problem.batch * problem.queries * problem.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += step) {
    const int64_t query = item / problem.heads;
    const A* reference = find_reference(problem, points, query / problem.queries, query % problem.queries);
    const int64_t base = item * num_samples;
    const Softmax<A> softmax(points, points.weights + base, num_samples);
    const A scale = A(1) / softmax.total;
    int64_t i = base;
    for (int level = 0; level < problem.levels; ++level) {
      for (int64_t p = 0; p < problem.points; ++p, ++i) {
        A x = points.locations[2 * i], y = points.locations[2 * i + 1];
        to_pixels(problem, reference, level, x, y);
        pixels[2 * i] = x;
        pixels[2 * i + 1] = y;
        const A weight = points.weights[i];
        shares[i] = points.reference != nullptr ? exp_of(weight - softmax.highest) * scale : weight;
      }
    }
  }
}

// Adds to grad_value in query order. A warp owns a band of lines of one level, for one image, one head and 32 channels,
// and scans all samples of the level for those that touch its lines.
constexpr int kBands = 32;  // per level

template <typename T>
__global__ void __launch_bounds__(128) deterministic_kernel(
    const __grid_constant__ Problem problem,
    const typename Accumulate<T>::type* __restrict__ pixels,
    const typename Accumulate<T>::type* __restrict__ shares,
    const T* __restrict__ grad_output,
    typename Accumulate<T>::type* grad_value) {
  using A = typename Accumulate<T>::type;
  const int lane = threadIdx.x % 32;
  const int64_t row = problem.heads * problem.channels;
  const int64_t parts = (problem.channels + 31) / 32;
  const int64_t tasks = problem.batch * problem.heads * problem.levels * kBands * parts;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; task < tasks;
       task += step) {
    int64_t rest = task / parts;
    const int64_t channel = task % parts * 32 + lane;
    const int64_t band = rest % kBands;
    rest /= kBands;
    const int64_t level = rest % problem.levels;
    rest /= problem.levels;
    const int64_t head = rest % problem.heads, batch = rest / problem.heads;
    const LevelSize size = problem.level[level];
    const int64_t begin = size.height * band / kBands, end = size.height * (band + 1) / kBands;
    if (begin == end || size.width == 0) continue;
    A* image = grad_value + (batch * problem.values + size.start) * row + head * problem.channels + channel;

    for (int64_t base = 0; base < problem.queries * problem.points; base += 32) {
      const int64_t mine = base + lane;
      const int64_t query = mine / problem.points;
      const int64_t my_item = (batch * problem.queries + query) * problem.heads + head;
      Cell<A> cell{};
      A share = 0;
      if (query < problem.queries) {
        const int64_t i = (my_item * problem.levels + level) * problem.points + mine % problem.points;
        cell = find_cell(pixels[2 * i], pixels[2 * i + 1], size.height, size.width);
        share = shares[i];
      }
      const bool touches = cell.inside != 0 && cell.y + 1 >= begin && cell.y < end;
      for (unsigned left = __ballot_sync(kWarp, touches); left != 0; left &= left - 1) {
        const int from = __ffs(left) - 1;
        const int64_t item = __shfl_sync(kWarp, my_item, from);
        const int x = __shfl_sync(kWarp, cell.x, from), y = __shfl_sync(kWarp, cell.y, from);
        const int inside = __shfl_sync(kWarp, cell.inside, from);
        const A fx = __shfl_sync(kWarp, cell.fx, from), fy = __shfl_sync(kWarp, cell.fy, from);
        const A weight = __shfl_sync(kWarp, share, from);
        if (channel >= problem.channels) continue;
        const A grad = weight * widen(grad_output[item * problem.channels + channel]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int needed = (c & 1 ? kRight : kLeft) | (c & 2 ? kBottom : kTop);
          const int64_t line = int64_t{y} + (c >> 1);
          if ((inside & needed) != needed || line < begin || line >= end) continue;
          image[(line * size.width + x + (c & 1)) * row] += grad * (c & 1 ? fx : 1 - fx) * (c & 2 ? fy : 1 - fy);
        }
      }
    }
  }
}

}  // namespace mask2former::cuda
