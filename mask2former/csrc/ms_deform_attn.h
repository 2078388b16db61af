// Multi-scale deformable attention: sizes and checks shared by the CPU and CUDA kernels.
//
// Shape letters: B batch, S values of all levels, Q queries, M heads, D channels per head, L levels, P points per level
// and head. All tensors are contiguous in the given order.
//
//   value                (B, S, M, D)         float, half, bfloat16 or double
//   sampling_locations   (B, Q, M, L, P, 2)   x, y in [0, 1] over a level             \ float; double if value is
//   attention_weights    (B, Q, M, L, P)                                              | double (see `accumulate_type`)
//   reference_points     (1 or B, Q, L, 2)    x, y in [0, 1]                          | (fused ops)
//   sampling_offsets     (B, Q, M, L, P, 2)   in pixels of the level                  |
//   attention_logits     (B, Q, M, L * P)     softmax over the last axis              /
//   output               (B, Q, M * D)        type of value
//
// A sample at pixel (x, y) = location * (width, height) - 0.5 is interpolated bilinearly, with zeros outside the level.
// A sample outside (-1, width) x (-1, height), or not finite, contributes nothing and gets no gradient.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace mask2former {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxLevels = 16;

// One level of the value. Positions within a level fit 31 bits; the start of a level may not.
struct Level {
  int64_t start;  // index of its first position in S
  int32_t height;
  int32_t width;
};

struct Sizes {
  int64_t batch;       // B
  int64_t values;      // S
  int64_t heads;       // M
  int64_t channels;    // D
  int64_t queries;     // Q
  int64_t levels;      // L
  int64_t points;      // P
  bool per_image_reference;  // reference_points has B entries instead of one for all images
  Level level[kMaxLevels];
};

// The type of all sums, and of every tensor except value, output and their gradients.
inline ScalarType accumulate_type(ScalarType value) {
  return value == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_like(const Tensor& value, const Tensor& tensor, ScalarType type, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype for this value");
  STD_TORCH_CHECK(tensor.device() == value.device(), name, " is not on the device of value");
}

// Reads the sizes from the arguments. `spatial_shapes` holds height and width of each level in turn; `locations` is
// sampling_locations or sampling_offsets.
//
// The Python API makes the same checks with better messages. These are for direct calls of torch.ops: no call may read
// or write out of bounds.
inline Sizes read_sizes(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& locations) {
  const auto type = value.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
          type == ScalarType::BFloat16,
      "value must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(value.dim() == 4, "value must be (B, S, M, D), got ", value.dim(), " dimensions");
  check_like(value, locations, accumulate_type(type), 6, "locations");
  Sizes sizes{};
  sizes.batch = value.size(0);
  sizes.values = value.size(1);
  sizes.heads = value.size(2);
  sizes.channels = value.size(3);
  sizes.queries = locations.size(1);
  sizes.levels = locations.size(3);
  sizes.points = locations.size(4);
  STD_TORCH_CHECK(
      locations.size(0) == sizes.batch && locations.size(2) == sizes.heads && locations.size(5) == 2,
      "locations must be (B, Q, M, L, P, 2) with B and M of value");
  STD_TORCH_CHECK(
      sizes.levels <= kMaxLevels, "at most ", kMaxLevels, " levels are supported, got ", sizes.levels);
  STD_TORCH_CHECK(
      static_cast<int64_t>(spatial_shapes.size()) == 2 * sizes.levels,
      "spatial_shapes must hold height and width of ", sizes.levels, " levels");
  int64_t start = 0;
  for (int64_t l = 0; l < sizes.levels; ++l) {
    const int64_t height = spatial_shapes[2 * l], width = spatial_shapes[2 * l + 1];
    constexpr int64_t limit = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(
        height >= 0 && width >= 0 && height <= limit && width <= limit && height * width <= limit,
        "level ", l, " has height ", height, " and width ", width, ", out of range");
    sizes.level[l] = {start, static_cast<int32_t>(height), static_cast<int32_t>(width)};
    start += height * width;
  }
  STD_TORCH_CHECK(start == sizes.values, "the levels hold ", start, " positions, value has ", sizes.values);
  return sizes;
}

inline void check_weights(const Sizes& sizes, const Tensor& value, const Tensor& weights) {
  check_like(value, weights, accumulate_type(value.scalar_type()), 5, "attention_weights");
  STD_TORCH_CHECK(
      weights.size(0) == sizes.batch && weights.size(1) == sizes.queries && weights.size(2) == sizes.heads &&
          weights.size(3) == sizes.levels && weights.size(4) == sizes.points,
      "attention_weights must be (B, Q, M, L, P)");
}

// For the fused ops; sets `sizes.per_image_reference`.
inline void check_fused(Sizes& sizes, const Tensor& value, const Tensor& reference, const Tensor& logits) {
  const auto type = accumulate_type(value.scalar_type());
  check_like(value, reference, type, 4, "reference_points");
  check_like(value, logits, type, 4, "attention_logits");
  STD_TORCH_CHECK(
      (reference.size(0) == 1 || reference.size(0) == sizes.batch) && reference.size(1) == sizes.queries &&
          reference.size(2) == sizes.levels && reference.size(3) == 2,
      "reference_points must be (1 or B, Q, L, 2)");
  STD_TORCH_CHECK(
      logits.size(0) == sizes.batch && logits.size(1) == sizes.queries && logits.size(2) == sizes.heads &&
          logits.size(3) == sizes.levels * sizes.points,
      "attention_logits must be (B, Q, M, L * P)");
  sizes.per_image_reference = reference.size(0) != 1;
}

inline void check_grad_output(const Sizes& sizes, const Tensor& value, const Tensor& grad_output) {
  check_like(value, grad_output, value.scalar_type(), 3, "grad_output");
  STD_TORCH_CHECK(
      grad_output.size(0) == sizes.batch && grad_output.size(1) == sizes.queries &&
          grad_output.size(2) == sizes.heads * sizes.channels,
      "grad_output must be (B, Q, M * D)");
}

}  // namespace mask2former
