// Transpose and cast in one pass: source row r, column c -> destination row c, column r, as fp16 (see
// transpose.hpp).
//
// Compiled by NVRTC, which has no headers at hand but the core's own: hence the integer names and the
// inline conversions.
#include "device/kernel_tile.hpp"

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kTile = pyint8::kTile;
constexpr int kRows = pyint8::kRows;

__device__ __forceinline__ float half_to_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ u16 float_to_half(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float bfloat16_to_float(u16 bits) {
  return __uint_as_float((u32)bits << 16);
}

__device__ __forceinline__ float round_to_bfloat16(float value) {
  const u32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return value;  // NaN must not round up to infinity
  return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

struct Half {
  u16 bits;
  __device__ float value() const { return half_to_float(bits); }
};
struct BFloat16 {
  u16 bits;
  __device__ float value() const { return bfloat16_to_float(bits); }
};
struct Float {
  float bits;
  __device__ float value() const { return bits; }
};

template <typename Source, bool through_bfloat16>
__device__ __forceinline__ void transpose(const Source* from, u64 rows, u64 columns, u16* to, u64 to_stride) {
  __shared__ u16
      tile[kTile][kTile + 1];  // one more column, so that a column's elements lie in different banks
  const u64 c0 = (u64)blockIdx.x * kTile;
  for (u64 r0 = (u64)blockIdx.y * kTile; r0 < rows; r0 += (u64)gridDim.y * kTile) {
    for (int i = threadIdx.y; i < kTile; i += kRows) {
      const u64 r = r0 + i;
      const u64 c = c0 + threadIdx.x;
      if (r < rows && c < columns) {
        const float value = from[r * columns + c].value();
        tile[i][threadIdx.x] = float_to_half(through_bfloat16 ? round_to_bfloat16(value) : value);
      }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < kTile; i += kRows) {
      const u64 r = r0 + threadIdx.x;
      const u64 c = c0 + i;
      if (r < rows && c < columns) to[c * to_stride + r] = tile[threadIdx.x][i];
    }
    __syncthreads();
  }
}

#define PYINT8_TRANSPOSE(name, source, through_bfloat16)                        \
  extern "C" __global__ void __launch_bounds__(kTile* kRows)                    \
      name(const source* from, u64 rows, u64 columns, u16* to, u64 to_stride) { \
    transpose<source, through_bfloat16>(from, rows, columns, to, to_stride);    \
  }

PYINT8_TRANSPOSE(transpose_half, Half, false)
PYINT8_TRANSPOSE(transpose_half_through_bfloat16, Half, true)
PYINT8_TRANSPOSE(transpose_bfloat16, BFloat16, false)
PYINT8_TRANSPOSE(transpose_float, Float, false)
PYINT8_TRANSPOSE(transpose_float_through_bfloat16, Float, true)
