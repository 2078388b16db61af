// Shared by the CUDA kernels: sizes, number formats, and the cell of a sample.
//
// The .cuh files use neither torch nor launches: the tests compile them for the CPU with an emulation of the few CUDA
// functions they call (see tests/ops/cuda_emulation.h). Shape letters as in ../ms_deform_attn.h.
//
// There are two sets of kernels. The fast ones handle float, half and bfloat16 with D = 16, 32 or 64 and any M, L, P
// and Q. The general ones handle everything else, including double and sizes beyond 31 bits.

#pragma once

#include <cstdint>

#ifndef MASK2FORMER_CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#endif

namespace mask2former::cuda {

constexpr int kTableLevels = 16;
constexpr unsigned kWarp = 0xffffffffu;

struct LevelSize {
  int64_t start;
  int32_t height;
  int32_t width;
};

struct Problem {
  int64_t batch, values, heads, channels, queries, levels, points;
  bool per_image_reference;
  LevelSize level[kTableLevels];
};

// Sampling locations and weights. With `reference`, locations are offsets in pixels and weights are logits.
template <typename A>
struct Points {
  const A* reference;  // null: the classic op
  const A* locations;
  const A* weights;
};

template <typename A>
struct PointGradients {
  A* locations;
  A* weights;
};

// ------------------------------------------------------------------------------------------------- number formats

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(double value, double& out) { out = value; }
__device__ __forceinline__ void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// The two 16-bit numbers of a 32-bit word, lower half first; bfloat16 is the upper half of a float.
__device__ __forceinline__ void widen_pair(unsigned word, float* out, __nv_bfloat16) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void widen_pair(unsigned word, float* out, __half) {
  out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
  out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
__device__ __forceinline__ unsigned narrow_pair(float low, float high, __nv_bfloat16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
         static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}
__device__ __forceinline__ unsigned narrow_pair(float low, float high, __half) {
  return __half_as_ushort(__float2half_rn(low)) | static_cast<unsigned>(__half_as_ushort(__float2half_rn(high))) << 16;
}

// Consecutive channels in one aligned load or store of 8 or 16 bytes.
template <typename T>
struct Four {
  uint2 words = make_uint2(0u, 0u);

  __device__ __forceinline__ void load(const T* from) { words = __ldg(reinterpret_cast<const uint2*>(from)); }
  __device__ __forceinline__ void get(float (&out)[4]) const {
    widen_pair(words.x, out, T());
    widen_pair(words.y, out + 2, T());
  }
};
template <>
struct Four<float> {
  float4 vector = make_float4(0.f, 0.f, 0.f, 0.f);

  __device__ __forceinline__ void load(const float* from) { vector = __ldg(reinterpret_cast<const float4*>(from)); }
  __device__ __forceinline__ void get(float (&out)[4]) const {
    out[0] = vector.x, out[1] = vector.y, out[2] = vector.z, out[3] = vector.w;
  }
};
__device__ __forceinline__ void load_channels(const float* from, float (&out)[4]) {
  Four<float> four;
  four.load(from);
  four.get(out);
}
template <typename T>
__device__ __forceinline__ void load_channels(const T* from, float (&out)[8]) {
  const uint4 vector = __ldg(reinterpret_cast<const uint4*>(from));
  widen_pair(vector.x, out, T());
  widen_pair(vector.y, out + 2, T());
  widen_pair(vector.z, out + 4, T());
  widen_pair(vector.w, out + 6, T());
}
__device__ __forceinline__ void store_channels(float* to, const float (&in)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(in[0], in[1], in[2], in[3]);
}
template <typename T>
__device__ __forceinline__ void store_channels(T* to, const float (&in)[8]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(
      narrow_pair(in[0], in[1], T()), narrow_pair(in[2], in[3], T()), narrow_pair(in[4], in[5], T()),
      narrow_pair(in[6], in[7], T()));
}

// Hides from the compiler how a pointer was computed. Without this it scales and adds the parts of the pointer for
// every access, three instructions instead of one multiply-add.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
#ifndef MASK2FORMER_CUDA_EMULATION
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// The same channel `row` rows later.
template <int kChannels, typename T>
__device__ __forceinline__ const T* to_row(const T* channel, int row) {
  const char* bytes = reinterpret_cast<const char*>(channel);
  return reinterpret_cast<const T*>(bytes + row * int64_t{kChannels * sizeof(T)});
}
template <int kChannels, typename T>
__device__ __forceinline__ T* to_row(T* channel, int row) {
  return const_cast<T*>(to_row<kChannels>(static_cast<const T*>(channel), row));
}

// Adds atomically.
__device__ __forceinline__ void add_channels(float* to, const float (&in)[4]) {
#if defined(MASK2FORMER_CUDA_EMULATION) || __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(in[0], in[1], in[2], in[3]));
#else
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, in[i]);
#endif
}

// ---------------------------------------------------------------------------------------- the cell of a sample

// Which columns and rows of a cell lie inside the level. A corner is inside if its column and its row are.
constexpr int kLeft = 1, kRight = 2, kTop = 4, kBottom = 8, kColumns = 3, kAll = 15;

template <typename A>
struct Cell {
  int x, y;    // top left corner, at least -1
  int inside;  // 0: the sample contributes nothing
  A fx, fy;    // offset from the top left corner, in [0, 1)
};

__device__ __forceinline__ float floor_of(float value) { return floorf(value); }
__device__ __forceinline__ double floor_of(double value) { return floor(value); }
__device__ __forceinline__ float exp_of(float value) { return expf(value); }
__device__ __forceinline__ double exp_of(double value) { return exp(value); }
// For a sum of exponentials, between 1 and the number of samples: avoids the subroutine of an exact division.
__device__ __forceinline__ float reciprocal(float value) { return __fdividef(1.f, value); }

// Converts to integers only within the valid range, so that far, infinite and NaN positions are safe.
template <typename A>
__device__ __forceinline__ Cell<A> find_cell(A x, A y, int height, int width) {
  Cell<A> cell{};
  if (x > -1 && y > -1 && x < width && y < height) {
    const A left = floor_of(x), top = floor_of(y);
    cell.x = static_cast<int>(left);
    cell.y = static_cast<int>(top);
    cell.fx = x - left;
    cell.fy = y - top;
    cell.inside = (cell.x >= 0 ? kLeft : 0) | (cell.x + 1 < width ? kRight : 0) | (cell.y >= 0 ? kTop : 0) |
                  (cell.y + 1 < height ? kBottom : 0);
  }
  return cell;
}

// The reference points of a query; null for the classic op.
template <typename A>
__device__ __forceinline__ const A* find_reference(
    const Problem& problem, const Points<A>& points, int64_t batch, int64_t query) {
  if (points.reference == nullptr) return nullptr;
  return points.reference + ((problem.per_image_reference ? batch * problem.queries : 0) + query) * problem.levels * 2;
}

// Converts sample (x, y) to pixels of its level.
template <typename A>
__device__ __forceinline__ void to_pixels(const Problem& problem, const A* reference, int level, A& x, A& y) {
  const A width = problem.level[level].width, height = problem.level[level].height;
  if (reference != nullptr) {
    x += reference[2 * level] * width - A(0.5);
    y += reference[2 * level + 1] * height - A(0.5);
  } else {
    x = x * width - A(0.5);
    y = y * height - A(0.5);
  }
}

// ------------------------------------------------------------------------------------------- queries of a block

// Division of n in [0, 2^31) by a number known at launch, in 3 instructions:
// n / divisor = (n + n * multiplier / 2^32) / 2^shift.
struct Divisor {
  uint32_t multiplier;
  int32_t shift;

  __device__ __forceinline__ int divide(int n) const {
    const uint32_t high = static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

inline Divisor make_divisor(int32_t divisor) {
  int32_t shift = 0;
  while (int64_t{1} << shift < divisor) ++shift;
  const uint64_t rest = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>((rest << 32) / static_cast<uint64_t>(divisor) + 1), shift};
}

// In the fast kernels a thread block processes one tile of queries, so that their samples share L1 cache lines. If
// there are as many queries as positions, queries are assumed to be those positions (the encoder of the pixel decoder)
// and a tile is a rectangle of a level; otherwise it is a run of queries. The choice affects speed only.
struct Tiles {
  int32_t count;
  int32_t blocks;  // per tile: consecutive in the grid
  bool on_levels;
  Divisor by_blocks;
  int32_t first[kTableLevels];    // index of the first tile of each level
  int32_t columns[kTableLevels];  // of tiles
  Divisor by_columns[kTableLevels];
};

// The query at index `i` of a tile in row-major order, or -1.
template <int kWidth, int kHeight>
__device__ __forceinline__ int tile_query(const Problem& problem, const Tiles& tiles, int tile, int i) {
  if (!tiles.on_levels) {
    const int64_t query = static_cast<int64_t>(tile) * (kWidth * kHeight) + i;
    return query < problem.queries ? static_cast<int>(query) : -1;
  }
  int level = 0;
  while (level + 1 < static_cast<int>(problem.levels) && tile >= tiles.first[level + 1]) ++level;
  const LevelSize size = problem.level[level];
  const int on_level = tile - tiles.first[level];
  const int row = tiles.by_columns[level].divide(on_level);
  const int y = row * kHeight + i / kWidth;
  const int x = (on_level - row * tiles.columns[level]) * kWidth + i % kWidth;
  return x < size.width && y < size.height ? static_cast<int>(size.start) + y * size.width + x : -1;
}

// A sample, passed from the lane that prepares it to the lanes that use it. `cell` is 16 times the row of value of its
// top left corner (position * M + head) plus Cell::inside; 0 if the sample contributes nothing.
struct __align__(16) Sample {
  float weight, fx, fy;
  int cell;
};

__device__ __forceinline__ Sample
make_sample(const Problem& problem, const Cell<float>& cell, float weight, int level, int head) {
  if (cell.inside == 0) return {0.f, 0.f, 0.f, 0};
  const LevelSize size = problem.level[level];
  const int position = static_cast<int>(size.start) + cell.y * size.width + cell.x;
  const int row = position * static_cast<int>(problem.heads) + head;
  return {weight, cell.fx, cell.fy, row * 16 + cell.inside};
}

template <int kLanes>
__device__ __forceinline__ float sum_lanes(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
  return value;
}
template <int kLanes>
__device__ __forceinline__ float max_lanes(float value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kWarp, value, step));
  return value;
}

}  // namespace mask2former::cuda
