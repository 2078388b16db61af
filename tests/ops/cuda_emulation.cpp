// The CUDA kernels as CPU functions, which test_cuda_emulation.py calls.

#include "cuda_emulation.h"

#include "../../mask2former/csrc/cuda/launch.cuh"

using namespace mask2former::cuda;

namespace {

// `sizes` holds B, S, M, D, Q, L, P and whether references are per image; `shapes` height and width of each level.
Problem make_problem(const int64_t* sizes, const int64_t* shapes) {
  Problem problem{};
  problem.batch = sizes[0], problem.values = sizes[1], problem.heads = sizes[2], problem.channels = sizes[3];
  problem.queries = sizes[4], problem.levels = sizes[5], problem.points = sizes[6];
  problem.per_image_reference = sizes[7] != 0;
  int64_t start = 0;
  for (int64_t l = 0; l < problem.levels; ++l) {
    problem.level[l] = {start, static_cast<int32_t>(shapes[2 * l]), static_cast<int32_t>(shapes[2 * l + 1])};
    start += shapes[2 * l] * shapes[2 * l + 1];
  }
  return problem;
}

// Types as in the test: 0 float, 1 double, 2 half, 3 bfloat16.
template <typename Call>
void with_type(int type, Call&& call) {
  switch (type) {
    case 0: return call(float());
    case 1: return call(double());
    case 2: return call(__half());
    default: return call(__nv_bfloat16());
  }
}

template <typename A>
Points<A> make_points(const void* reference, const void* locations, const void* weights) {
  return {static_cast<const A*>(reference), static_cast<const A*>(locations), static_cast<const A*>(weights)};
}

}  // namespace

extern "C" {

void emulated_forward(
    int type,
    const int64_t* sizes,
    const int64_t* shapes,
    const void* value,
    const void* reference,
    const void* locations,
    const void* weights,
    void* output) {
  const Problem problem = make_problem(sizes, shapes);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch_forward<T>(
        problem, make_points<typename Accumulate<T>::type>(reference, locations, weights),
        static_cast<const T*>(value), static_cast<T*>(output), nullptr);
  });
}

// `grad_value` is zero initially and has the accumulate type. `room` is scratch memory of the deterministic path, 3
// numbers per sample; null selects the path with atomics. `shared`: collect them in shared memory.
void emulated_backward(
    int type,
    int shared,
    const int64_t* sizes,
    const int64_t* shapes,
    const void* grad_output,
    const void* value,
    const void* reference,
    const void* locations,
    const void* weights,
    void* grad_value,
    void* grad_locations,
    void* grad_weights,
    void* room) {
  const Problem problem = make_problem(sizes, shapes);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const Points<A> points = make_points<A>(reference, locations, weights);
    A* const sums = static_cast<A*>(grad_value);
    launch_backward<T>(
        problem, points, static_cast<const T*>(value), static_cast<const T*>(grad_output),
        room == nullptr ? sums : nullptr, {static_cast<A*>(grad_locations), static_cast<A*>(grad_weights)},
        shared ? Collect::kSharedMemory : Collect::kRegisters, nullptr);
    if (room != nullptr) {
      const int64_t samples =
          problem.batch * problem.queries * problem.heads * problem.levels * problem.points;
      A* const pixels = static_cast<A*>(room);
      launch_deterministic<T>(
          problem, points, static_cast<const T*>(grad_output), pixels, pixels + 2 * samples, sums, nullptr);
    }
  });
}

// What MASK2FORMER_BACKWARD selects: 0 registers, 1 shared memory, -1 an error.
int parsed_collect(const char* text) {
  Collect collect;
  return read_collect(text, collect) ? collect == Collect::kSharedMemory : -1;
}

int divided(int number, int divisor) { return make_divisor(divisor).divide(number); }

// Whether the fast kernels accept these sizes. Allocates nothing.
int fits_fast_kernels(const int64_t* sizes) {
  const int64_t no_shapes[2 * kTableLevels] = {};
  return fits_fast(make_problem(sizes, no_shapes));
}
}
