// The CUDA operators: checks and launches. The kernels are in the .cuh files of this folder.

#include "../ms_deform_attn.h"
#include "launch.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>

// Weak, because the library must also load into a torch without CUDA, which lacks this symbol.
#pragma weak aoti_torch_get_current_cuda_stream

namespace mask2former::cuda {
namespace {

static_assert(kTableLevels == kMaxLevels);

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "ms_deform_attn: the CUDA launch failed: ", cudaGetErrorString(error));
}

Problem make_problem(const Sizes& sizes) {
  Problem problem{};
  problem.batch = sizes.batch;
  problem.values = sizes.values;
  problem.heads = sizes.heads;
  problem.channels = sizes.channels;
  problem.queries = sizes.queries;
  problem.levels = sizes.levels;
  problem.points = sizes.points;
  problem.per_image_reference = sizes.per_image_reference;
  for (int64_t l = 0; l < sizes.levels; ++l) {
    problem.level[l] = {sizes.level[l].start, sizes.level[l].height, sizes.level[l].width};
  }
  return problem;
}

// Calls `call` with a null pointer to the C++ type of `type`.
template <typename Call>
void with_type(ScalarType type, Call&& call) {
  switch (type) {
    case ScalarType::Float: return call(static_cast<float*>(nullptr));
    case ScalarType::Double: return call(static_cast<double*>(nullptr));
    case ScalarType::Half: return call(static_cast<__half*>(nullptr));
    default: return call(static_cast<__nv_bfloat16*>(nullptr));
  }
}

template <typename A>
Points<A> make_points(const Tensor* reference, const Tensor& locations, const Tensor& weights) {
  return {
      reference == nullptr ? nullptr : static_cast<const A*>(reference->const_data_ptr()),
      static_cast<const A*>(locations.const_data_ptr()), static_cast<const A*>(weights.const_data_ptr())};
}

// How backward collects additions, from the environment at the first call.
Collect choose_collect() {
  static const Collect chosen = [] {
    const char* const text = std::getenv("MASK2FORMER_BACKWARD");
    Collect collect;
    STD_TORCH_CHECK(
        read_collect(text, collect), "MASK2FORMER_BACKWARD must be registers or shared, got ", text);
    return collect;
  }();
  return chosen;
}

// --------------------------------------------------------------------------------------------------- operators

Tensor forward(
    const Sizes& sizes, Tensor value, const Tensor* reference, Tensor locations, Tensor weights) {
  const Problem problem = make_problem(sizes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const std::vector<int64_t> shape{sizes.batch, sizes.queries, sizes.heads * sizes.channels};
  if (is_empty(problem)) return torch::stable::new_zeros(value, shape);
  Tensor output = torch::stable::new_empty(value, shape);
  with_type(value.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_forward<T>(
        problem, make_points<typename Accumulate<T>::type>(reference, locations, weights),
        static_cast<const T*>(value.const_data_ptr()), static_cast<T*>(output.mutable_data_ptr()),
        current_stream(value));
  });
  check_launch();
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Sizes& sizes,
    Tensor grad_output,
    Tensor value,
    const Tensor* reference,
    Tensor locations,
    Tensor weights,
    bool deterministic) {
  const Problem problem = make_problem(sizes);
  const Collect collect = choose_collect();
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const ScalarType type = value.scalar_type(), sum_type = accumulate_type(type);
  const std::vector<int64_t> shape{sizes.batch, sizes.values, sizes.heads, sizes.channels};
  if (is_empty(problem)) {
    return {
        torch::stable::new_zeros(value, shape), torch::stable::new_zeros(locations, locations.sizes()),
        torch::stable::new_zeros(weights, weights.sizes())};
  }
  Tensor grad_value = torch::stable::new_zeros(value, shape, sum_type);
  Tensor grad_locations = torch::stable::empty_like(locations), grad_weights = torch::stable::empty_like(weights);
  with_type(type, [&](auto* pointer) {
    using T = std::remove_pointer_t<decltype(pointer)>;
    using A = typename Accumulate<T>::type;
    const Points<A> points = make_points<A>(reference, locations, weights);
    const cudaStream_t stream = current_stream(value);
    const T* const grad_output_data = static_cast<const T*>(grad_output.const_data_ptr());
    A* const grad_value_data = static_cast<A*>(grad_value.mutable_data_ptr());
    launch_backward<T>(
        problem, points, static_cast<const T*>(value.const_data_ptr()), grad_output_data,
        deterministic ? nullptr : grad_value_data,
        {static_cast<A*>(grad_locations.mutable_data_ptr()), static_cast<A*>(grad_weights.mutable_data_ptr())},
        collect, stream);
    if (deterministic) {
      check_launch();
      Tensor pixels = torch::stable::empty_like(locations), shares = torch::stable::empty_like(weights);
      launch_deterministic<T>(
          problem, points, grad_output_data, static_cast<A*>(pixels.mutable_data_ptr()),
          static_cast<A*>(shares.mutable_data_ptr()), grad_value_data, stream);
    }
  });
  check_launch();
  if (type != sum_type) grad_value = torch::stable::to(grad_value, type);
  return {std::move(grad_value), std::move(grad_locations), std::move(grad_weights)};
}

Tensor ms_deform_attn(
    const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes sizes = read_sizes(value, shapes, locations);
  check_weights(sizes, value, weights);
  using torch::stable::contiguous;
  return forward(sizes, contiguous(value), nullptr, contiguous(locations), contiguous(weights));
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output,
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool deterministic) {
  const Sizes sizes = read_sizes(value, shapes, locations);
  check_weights(sizes, value, weights);
  check_grad_output(sizes, value, grad_output);
  using torch::stable::contiguous;
  return backward(
      sizes, contiguous(grad_output), contiguous(value), nullptr, contiguous(locations), contiguous(weights),
      deterministic);
}

Tensor ms_deform_attn_fused(
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& reference,
    const Tensor& offsets,
    const Tensor& logits) {
  Sizes sizes = read_sizes(value, shapes, offsets);
  check_fused(sizes, value, reference, logits);
  using torch::stable::contiguous;
  const Tensor points = contiguous(reference);
  return forward(sizes, contiguous(value), &points, contiguous(offsets), contiguous(logits));
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output,
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& reference,
    const Tensor& offsets,
    const Tensor& logits,
    bool deterministic) {
  Sizes sizes = read_sizes(value, shapes, offsets);
  check_fused(sizes, value, reference, logits);
  check_grad_output(sizes, value, grad_output);
  using torch::stable::contiguous;
  const Tensor points = contiguous(reference);
  return backward(
      sizes, contiguous(grad_output), contiguous(value), &points, contiguous(offsets), contiguous(logits),
      deterministic);
}

}  // namespace
}  // namespace mask2former::cuda

STABLE_TORCH_LIBRARY_IMPL(mask2former, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&mask2former::cuda::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&mask2former::cuda::ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&mask2former::cuda::ms_deform_attn_fused));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&mask2former::cuda::ms_deform_attn_fused_backward));
}
