// The CPU operators: instruction sets, threads and tensors. The arithmetic is in kernels.h.
//
// The order of sums does not depend on the number of threads: in forward each output belongs to one thread, in backward
// each (image, head) does, with everything written for it. Half precision is computed in float.

#include "../ms_deform_attn.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

namespace mask2former {
namespace {

template <typename T>
struct Arguments {
  Sizes sizes;
  const T* value;
  const T* locations;  // sampling_locations; sampling_offsets if there is a reference
  const T* weights;    // attention_weights; attention_logits if there is a reference
  const T* reference;  // null for the classic operators
};

template <typename T>
struct Gradients {
  const T* output;
  T* value;
  T* locations;
  T* weights;
};

template <typename T>
struct Kernels {
  void (*forward)(const Arguments<T>&, T*, T*, int64_t, int64_t);
  void (*backward)(const Arguments<T>&, const Gradients<T>&, T*, T*, int64_t, int64_t);
  int64_t arrays;  // numbers per sample
  int64_t lanes;   // rows of samples are padded to a multiple of this
};

constexpr int64_t kBlock = 8;     // rows of samples that backward prepares at a time
constexpr int64_t kQueries = 64;  // queries that a thread takes at a time in forward

#if defined(__x86_64__)
#define M2F_TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#define M2F_VECTOR_BYTES 64
namespace avx512 {
#include "kernels.h"
}
#undef M2F_TARGET
#undef M2F_VECTOR_BYTES
#define M2F_TARGET __attribute__((target("avx2,fma")))
#define M2F_VECTOR_BYTES 32
namespace avx2 {
#include "kernels.h"
}
#undef M2F_TARGET
#undef M2F_VECTOR_BYTES
#endif

// The baseline of each architecture: SSE2, NEON, VSX.
#define M2F_TARGET
#define M2F_VECTOR_BYTES 16
namespace baseline {
#include "kernels.h"
}

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best set of this machine, limited by ATEN_CPU_CAPABILITY as PyTorch's own kernels are.
InstructionSet detect() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable == nullptr ? "" : variable;
  __builtin_cpu_init();
  if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    return wide && limit != "avx2" ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kBaseline;
}

template <typename T>
const Kernels<T>& select_kernels() {
#if defined(__x86_64__)
  static const InstructionSet set = detect();
  if (set == InstructionSet::kAvx512) return avx512::kernels<T>;
  if (set == InstructionSet::kAvx2) return avx2::kernels<T>;
#endif
  return baseline::kernels<T>;
}

// Zeroed memory, aligned for every vector type.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new T[count + 64 / sizeof(T)]()) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  T* data() { return data_; }

 private:
  std::unique_ptr<T[]> memory_;
  T* data_;
};

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// The minimum number of items per thread, at `cost` multiply-adds each.
int64_t grain(int64_t cost) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cost)); }

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls f with a number of the accumulate type of `type`.
template <typename F>
void dispatch(ScalarType type, const F& f) {
  if (type == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

// Makes a tensor contiguous and casts it to its accumulate type.
Tensor prepare(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, accumulate_type(tensor.scalar_type())));
}

template <typename T>
int64_t scratch_size(const Sizes& z, int64_t rows) {
  const auto& kernels = select_kernels<T>();
  return kernels.arrays * rows * round_up(z.levels * z.points, kernels.lanes);
}

// `reference` is null for the classic operators.
template <typename T>
Arguments<T> make_arguments(
    const Sizes& z, const Tensor& value, const Tensor* reference, const Tensor& locations, const Tensor& weights) {
  return {z, data<T>(value), data<T>(locations), data<T>(weights), reference == nullptr ? nullptr : data<T>(*reference)};
}

Tensor forward(
    const Tensor& value, const Sizes& z, const Tensor* reference, const Tensor& locations, const Tensor& weights) {
  const Tensor v = prepare(value), l = prepare(locations), w = prepare(weights);
  const Tensor r = reference == nullptr ? l : prepare(*reference);
  const Tensor output = torch::stable::new_empty(v, {z.batch, z.queries, z.heads * z.channels});
  dispatch(v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto arguments = make_arguments<T>(z, v, reference == nullptr ? nullptr : &r, l, w);
    // Threads take blocks of queries in turn: queries of coarse levels, which come first, access the fine levels with
    // poor locality and take longer.
    const int64_t queries = z.batch * z.queries, cost = 4 * z.levels * z.points * z.heads * z.channels;
    const int64_t useful = (queries + grain(cost) - 1) / grain(cost);
    const int64_t teams = std::min<int64_t>(torch::stable::get_num_threads(), useful);
    torch::stable::parallel_for(0, teams, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(scratch_size<T>(z, z.heads));
      for (int64_t team = begin; team < end; ++team) {
        for (int64_t first = team * kQueries; first < queries; first += teams * kQueries) {
          const int64_t last = std::min(first + kQueries, queries);
          select_kernels<T>().forward(arguments, data<T>(output), scratch.data(), first, last);
        }
      }
    });
  });
  return torch::stable::to(output, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output,
    const Tensor& value,
    const Sizes& z,
    const Tensor* reference,
    const Tensor& locations,
    const Tensor& weights) {
  const Tensor v = prepare(value), l = prepare(locations), w = prepare(weights), g = prepare(grad_output);
  const Tensor r = reference == nullptr ? l : prepare(*reference);
  const Tensor grad_value = torch::stable::new_empty(v, v.sizes());
  const Tensor grad_locations = torch::stable::new_empty(l, l.sizes());
  const Tensor grad_weights = torch::stable::new_empty(w, w.sizes());
  dispatch(v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto arguments = make_arguments<T>(z, v, reference == nullptr ? nullptr : &r, l, w);
    const Gradients<T> gradients{data<T>(g), data<T>(grad_value), data<T>(grad_locations), data<T>(grad_weights)};
    const int64_t cost = 8 * z.queries * z.levels * z.points * z.channels;
    torch::stable::parallel_for(0, z.batch * z.heads, grain(cost), [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(scratch_size<T>(z, kBlock)), packed(2 * z.values * z.channels);
      select_kernels<T>().backward(arguments, gradients, scratch.data(), packed.data(), begin, end);
    });
  });
  return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_weights};
}

Tensor ms_deform_attn(
    const Tensor& value, std::vector<int64_t> shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes sizes = read_sizes(value, shapes, locations);
  check_weights(sizes, value, weights);
  return forward(value, sizes, nullptr, locations, weights);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output,
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& locations,
    const Tensor& weights,
    bool /* deterministic: always */) {
  const Sizes sizes = read_sizes(value, shapes, locations);
  check_weights(sizes, value, weights);
  check_grad_output(sizes, value, grad_output);
  return backward(grad_output, value, sizes, nullptr, locations, weights);
}

Tensor ms_deform_attn_fused(
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& reference,
    const Tensor& offsets,
    const Tensor& logits) {
  Sizes sizes = read_sizes(value, shapes, offsets);
  check_fused(sizes, value, reference, logits);
  return forward(value, sizes, &reference, offsets, logits);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output,
    const Tensor& value,
    std::vector<int64_t> shapes,
    const Tensor& reference,
    const Tensor& offsets,
    const Tensor& logits,
    bool /* deterministic: always */) {
  Sizes sizes = read_sizes(value, shapes, offsets);
  check_fused(sizes, value, reference, logits);
  check_grad_output(sizes, value, grad_output);
  return backward(grad_output, value, sizes, &reference, offsets, logits);
}

}  // namespace
}  // namespace mask2former

STABLE_TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&mask2former::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&mask2former::ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&mask2former::ms_deform_attn_fused));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&mask2former::ms_deform_attn_fused_backward));
}

// The instruction set that the kernels use on this machine.
extern "C" __attribute__((visibility("default"))) const char* mask2former_cpu_instructions() {
  switch (mask2former::detect()) {
    case mask2former::InstructionSet::kAvx512:
      return "AVX-512";
    case mask2former::InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "the instructions that every CPU of its kind has";
  }
}
