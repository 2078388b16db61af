// Schemas of the operators, and the architectures the library was built for.
//
// cpu/ and cuda/ register the kernels; Python adds autograd, fake tensors and checks with helpful messages.

#include "ms_deform_attn.h"

#ifndef MASK2FORMER_CUDA_ARCHITECTURES
#define MASK2FORMER_CUDA_ARCHITECTURES ""
#endif

STABLE_TORCH_LIBRARY(mask2former, m) {
  m.def(
      "ms_deform_attn(Tensor value, int[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, int[] spatial_shapes, Tensor sampling_locations,"
      " Tensor attention_weights, bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, int[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets,"
      " Tensor attention_logits) -> Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, int[] spatial_shapes, Tensor reference_points,"
      " Tensor sampling_offsets, Tensor attention_logits, bool deterministic) -> (Tensor, Tensor, Tensor)");
}

extern "C" {
// Compute capabilities that the CUDA kernels were compiled for, such as "8.0 9.0 12.0+PTX"; empty without CUDA.
__attribute__((visibility("default"))) const char* mask2former_cuda_architectures() {
  return MASK2FORMER_CUDA_ARCHITECTURES;
}
}
