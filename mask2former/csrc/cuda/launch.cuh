// Chooses the kernel and its grid. The emulation defines its own `launch`.

#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "general_backward.cuh"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string_view>
#include <type_traits>

namespace mask2former::cuda {

#ifndef MASK2FORMER_CUDA_EMULATION
template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
}
#endif

// Nothing to sample or nothing to write.
inline bool is_empty(const Problem& problem) {
  return problem.batch * problem.queries * problem.heads * problem.channels == 0 ||
         problem.levels * problem.points == 0 || problem.values == 0;
}

// Number of blocks for kernels with a grid-stride loop.
inline unsigned general_blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>(std::min<int64_t>((items + per_block - 1) / per_block, int64_t{1} << 20));
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
}

// Whether the 32-bit arithmetic of the fast kernels does not overflow; see Sample::cell.
inline bool fits_fast(const Problem& problem) {
  return (problem.channels == 16 || problem.channels == 32 || problem.channels == 64) &&
         problem.values < (int64_t{1} << 27) / problem.heads - 1 && problem.queries < (int64_t{1} << 30) &&
         problem.levels * problem.points < (int64_t{1} << 24) && problem.batch <= 65535;
}

// The tiling; count is 0 if count * blocks_per_tile blocks do not fit a grid.
inline Tiles make_tiles(const Problem& problem, int width, int height, int64_t blocks_per_tile) {
  Tiles tiles{};
  tiles.blocks = static_cast<int32_t>(blocks_per_tile);
  tiles.by_blocks = make_divisor(tiles.blocks);
  tiles.on_levels = problem.queries == problem.values;
  int64_t count = 0;
  if (tiles.on_levels) {
    for (int l = 0; l < problem.levels; ++l) {
      const LevelSize size = problem.level[l];
      tiles.first[l] = static_cast<int32_t>(count);
      tiles.columns[l] = static_cast<int32_t>((int64_t{size.width} + width - 1) / width);
      tiles.by_columns[l] = make_divisor(std::max(tiles.columns[l], 1));
      count += tiles.columns[l] * ((int64_t{size.height} + height - 1) / height);
    }
  } else {
    count = (problem.queries + width * height - 1) / (width * height);
  }
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  tiles.count = count <= limit / blocks_per_tile ? static_cast<int32_t>(count) : 0;
  return tiles;
}

// The usual numbers of samples have their own instances of the fast kernels with D = 32.
inline bool has_samples(const Problem& problem, int levels, int points) {
  return problem.levels == levels && problem.points == points;
}

template <typename T, int kLanes>
bool launch_fast_forward(
    const Problem& problem, const Points<float>& points, const T* value, T* output, cudaStream_t stream) {
  using Shape = ForwardShape<T, kLanes>;
  const int64_t head_blocks = (problem.heads + Shape::kHeads - 1) / Shape::kHeads;
  const Tiles tiles = make_tiles(problem, Shape::kTileWidth, Shape::kTileHeight, head_blocks);
  if (tiles.count == 0) return false;
  const dim3 grid(static_cast<unsigned>(tiles.count * head_blocks), static_cast<unsigned>(problem.batch));
  auto* kernel = forward_kernel<T, kLanes, 0, 0>;
  if constexpr (kLanes * Shape::kVector == 32) {
    if (has_samples(problem, 3, 4)) kernel = forward_kernel<T, kLanes, 3, 4>;
    if (has_samples(problem, 4, 4)) kernel = forward_kernel<T, kLanes, 4, 4>;
  }
  launch(kernel, grid, Shape::kThreads, stream, problem, tiles, points, value, output);
  return true;
}

template <typename T>
void launch_forward(
    const Problem& problem,
    const Points<typename Accumulate<T>::type>& points,
    const T* value,
    T* output,
    cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (fits_fast(problem) && is_aligned({value, output, points.locations, points.weights})) {
      constexpr int kVector = 16 / sizeof(T);
      const bool launched =
          problem.channels == 16   ? launch_fast_forward<T, 16 / kVector>(problem, points, value, output, stream)
          : problem.channels == 32 ? launch_fast_forward<T, 32 / kVector>(problem, points, value, output, stream)
                                   : launch_fast_forward<T, 64 / kVector>(problem, points, value, output, stream);
      if (launched) return;
    }
  }
  const int64_t items = problem.batch * problem.queries * problem.heads * problem.channels;
  launch(forward_general_kernel<T>, general_blocks(items, 256), 256, stream, problem, points, value, output);
}

// Reads the environment variable MASK2FORMER_BACKWARD: registers (also if not set) or shared. False if it is neither.
inline bool read_collect(const char* text, Collect& collect) {
  const std::string_view name = text == nullptr ? "" : text;
  collect = name == "shared" ? Collect::kSharedMemory : Collect::kRegisters;
  return name.empty() || name == "registers" || name == "shared";
}

template <typename T, int kLanes>
bool launch_fast_backward(
    const Problem& problem,
    const Points<float>& points,
    const T* value,
    const T* grad_output,
    float* grad_value,
    const PointGradients<float>& gradients,
    Collect collect,
    cudaStream_t stream) {
  const Tiles tiles = make_tiles(problem, kLanes, kBackwardThreads / kLanes, problem.heads);
  if (tiles.count == 0) return false;
  const dim3 grid(static_cast<unsigned>(tiles.count * problem.heads), static_cast<unsigned>(problem.batch));
  auto* kernel = backward_kernel<T, kLanes, 0, 0, Collect::kRegisters>;
  if constexpr (kLanes == 8) {
    if (has_samples(problem, 3, 4)) kernel = backward_kernel<T, kLanes, 3, 4, Collect::kRegisters>;
    if (has_samples(problem, 4, 4)) kernel = backward_kernel<T, kLanes, 4, 4, Collect::kRegisters>;
    if (collect == Collect::kSharedMemory && grad_value != nullptr) {
      kernel = backward_kernel<T, kLanes, 0, 0, Collect::kSharedMemory>;
    }
  }
  launch(
      kernel, grid, kBackwardThreads, stream, problem, tiles, points, value, grad_output, grad_value, gradients);
  return true;
}

// `collect` applies to D = 32; other sizes have kernels for registers only.
template <typename T>
void launch_backward(
    const Problem& problem,
    const Points<typename Accumulate<T>::type>& points,
    const T* value,
    const T* grad_output,
    typename Accumulate<T>::type* grad_value,
    const PointGradients<typename Accumulate<T>::type>& gradients,
    Collect collect,
    cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (fits_fast(problem) &&
        is_aligned(
            {value, grad_output, grad_value, points.locations, points.weights, gradients.locations,
             gradients.weights})) {
      const auto launch_fast = problem.channels == 16   ? launch_fast_backward<T, 4>
                               : problem.channels == 32 ? launch_fast_backward<T, 8>
                                                        : launch_fast_backward<T, 16>;
      if (launch_fast(problem, points, value, grad_output, grad_value, gradients, collect, stream)) return;
    }
  }
  const int64_t items = problem.batch * problem.queries * problem.heads;
  launch(
      backward_general_kernel<T>, general_blocks(items, 4), 128, stream, problem, points, value, grad_output,
      grad_value, gradients);
}

// Adds to grad_value in a fixed order. `pixels` and `shares` are scratch memory for positions and weights of all
// samples.
template <typename T>
void launch_deterministic(
    const Problem& problem,
    const Points<typename Accumulate<T>::type>& points,
    const T* grad_output,
    typename Accumulate<T>::type* pixels,
    typename Accumulate<T>::type* shares,
    typename Accumulate<T>::type* grad_value,
    cudaStream_t stream) {
  using A = typename Accumulate<T>::type;
  const int64_t items = problem.batch * problem.queries * problem.heads;
  launch(expand_points_kernel<A>, general_blocks(items, 256), 256, stream, problem, points, pixels, shares);
  const int64_t tasks = problem.batch * problem.heads * problem.levels * kBands * ((problem.channels + 31) / 32);
  launch(
      deterministic_kernel<T>, general_blocks(tasks, 4), 128, stream, problem, pixels, shares, grad_output, grad_value);
}

}  // namespace mask2former::cuda
