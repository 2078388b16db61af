// Runs CUDA kernels on the CPU, one block after the other. Covers what mask2former/csrc/cuda/*.cuh use of CUDA.
//
// Every thread of a block is a fiber with its own stack. Warp functions (shuffles, votes, __syncwarp) are barriers: a
// fiber waits until all threads of its warp that have not returned arrive. __syncthreads is one for the block, which no
// thread may leave early. Other threads run before every few atomicCAS, so that some fail.
//
// The emulation verifies index arithmetic, shuffles, reductions and conversions, and with a sanitizer that no access is
// out of bounds or misaligned. It does not find races (fibers switch at barriers and
// atomicCAS only) or effects of memory order or
// divergence, and says nothing about speed. Shuffles are for whole warps: the mask is ignored.

#pragma once

// Its longjmp refuses to switch stacks.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define MASK2FORMER_CUDA_EMULATION
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define CUDART_INF_F HUGE_VALF

using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ------------------------------------------------------------------------------------------------- numbers

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned{value.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const unsigned bits = __float_as_uint(value);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float sign = value.bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * HUGE_VALF;
  return sign * (exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24));
}
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  const float size = std::fabs(value);
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // In ulp; a mantissa of 2048 carries into the exponent without further code.
  const int exponent = size < 6.1035156e-05f ? -14 : std::ilogb(size);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units))};
}

inline float __fdividef(float numerator, float denominator) { return numerator / denominator; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline void atomicAdd(float* to, float value) { *to += value; }
inline void atomicAdd(double* to, double value) { *to += value; }
inline void atomicAdd(float4* to, float4 value) {
  to->x += value.x, to->y += value.y, to->z += value.z, to->w += value.w;
}
using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------- threads

namespace emulation {

constexpr int kWarpSize = 32;

struct Warp {
  int running = 0, arrived = 0;
  unsigned meeting = 0;
  double slot[2][kWarpSize];  // of this barrier and of the previous one, which some threads have not read yet
  bool present[2][kWarpSize];
};

// Runs one thread of each block, forever. A context only starts it: switching by longjmp makes no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf position;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool finished;
};

struct Block {
  unsigned threads = 0, arrived = 0, meeting = 0;
};

inline std::deque<Fiber> fibers;  // a context must not move
inline Block block;
inline std::vector<Warp> warps;
inline jmp_buf scheduler;
inline unsigned current;
inline std::function<void()> body;

// Lets the other threads run.
__attribute__((noinline)) inline void yield() {
  if (_setjmp(fibers[current].position) == 0) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) == 0) _longjmp(fiber.position, 1);
}

inline void open_next_meeting(Warp& warp) {
  warp.arrived = 0;
  ++warp.meeting;
  std::fill_n(warp.present[warp.meeting % 2], kWarpSize, false);
}

inline void run_fiber() {
  for (;;) {
    yield();
    body();
    Warp& warp = warps[current / kWarpSize];
    fibers[current].finished = true;
    --warp.running;
    if (warp.running > 0 && warp.arrived == warp.running) open_next_meeting(warp);
  }
}

// Runs a new fiber up to its first yield.
__attribute__((noinline)) inline void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, run_fiber, 0);
  if (_setjmp(scheduler) == 0) setcontext(&fiber.context);
}

// Publishes `value` to the warp and waits for the others. Returns the index of the barrier, for reading their values.
template <typename T>
unsigned meet(const T& value) {
  static_assert(sizeof(T) <= sizeof(double));
  Warp& warp = warps[current / kWarpSize];
  const unsigned meeting = warp.meeting, lane = current % kWarpSize;
  std::memcpy(&warp.slot[meeting % 2][lane], &value, sizeof(T));
  warp.present[meeting % 2][lane] = true;
  if (++warp.arrived == warp.running) open_next_meeting(warp);
  while (warp.meeting == meeting) yield();
  return meeting;
}

// The value that `lane` published; reading that of a returned thread is an error.
template <typename T>
T read(unsigned meeting, unsigned lane) {
  const Warp& warp = warps[current / kWarpSize];
  if (!warp.present[meeting % 2][lane]) std::abort();
  T value;
  std::memcpy(&value, &warp.slot[meeting % 2][lane], sizeof(T));
  return value;
}

inline void meet_block() {
  const unsigned meeting = block.meeting;
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    ++block.meeting;
  }
  while (block.meeting == meeting) yield();
}

inline void run_block(unsigned threads) {
  block = {threads};
  for (current = fibers.size(); current < threads; ++current) start(fibers.emplace_back());
  warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp());
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].finished = false;
    ++warps[i / kWarpSize].running;
  }
  for (bool any = true; any;) {
    any = false;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].finished) continue;
      any = true;
      threadIdx = dim3(current);
      resume(fibers[current]);
    }
  }
}

}  // namespace emulation

inline void __syncwarp() { emulation::meet(0); }
inline void __syncthreads() { emulation::meet_block(); }

inline unsigned long long atomicCAS(unsigned long long* to, unsigned long long expected, unsigned long long value) {
  static unsigned calls = 0;
  if (++calls % 5 == 0) emulation::yield();
  const unsigned long long old = *to;
  if (old == expected) *to = value;
  return old;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::read<T>(emulation::meet(value), lane / width * width + from % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::read<T>(emulation::meet(value), lane ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const unsigned meeting = emulation::meet(value);
  const emulation::Warp& warp = emulation::warps[emulation::current / 32];
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (warp.present[meeting % 2][lane] && emulation::read<bool>(meeting, lane)) bits |= 1u << lane;
  }
  return bits;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, !value) == 0; }

namespace mask2former::cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t, const Arguments&... arguments) {
  gridDim = grid;
  blockDim = dim3(threads);
  emulation::body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      emulation::run_block(threads);
    }
  }
}

}  // namespace mask2former::cuda
