// Transpose and cast in one pass: source row r, column c -> destination row c, column r, as fp16 (see
// transpose.hpp). And cast alone, marking what is not finite (see cast.hpp).
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

// As torch's casts on a GPU: NaN becomes the one of the conversion instruction, where there is one.
__device__ __forceinline__ u16 float_to_bfloat16(float value) {
#if __CUDA_ARCH__ >= 800
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  if ((__float_as_uint(value) & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return (u16)(__float_as_uint(round_to_bfloat16(value)) >> 16);
#endif
}

__device__ __forceinline__ bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7fffffffu) < 0x7f800000u;
}
__device__ __forceinline__ bool is_infinite(float value) {
  return (__float_as_uint(value) & 0x7fffffffu) == 0x7f800000u;
}

struct Half {
  u16 bits;
  static __device__ Half of(float value) { return {float_to_half(value)}; }
  __device__ float value() const { return half_to_float(bits); }
};
struct BFloat16 {
  u16 bits;
  static __device__ BFloat16 of(float value) { return {float_to_bfloat16(value)}; }
  __device__ float value() const { return bfloat16_to_float(bits); }
};
struct Float {
  float bits;
  static __device__ Float of(float value) { return {value}; }
  __device__ float value() const { return bits; }
};

// Of the same dtype the bits stay, those of a NaN too.
template <typename Source, typename Target, bool through_bfloat16>
struct Cast {
  static __device__ Target of(Source source) {
    return Target::of(through_bfloat16 ? round_to_bfloat16(source.value()) : source.value());
  }
};
template <typename Same>
struct Cast<Same, Same, false> {
  static __device__ Same of(Same source) { return source; }
};

template <typename T>
struct alignas(16) Pack {
  T items[pyint8::kCastWidth];
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

struct Marking {
  unsigned char* marks;
  u64 per_mark;
  u64 overflow_only;

  __device__ bool wants(float source, float result) const {
    return !is_finite(result) && (!overflow_only || (is_infinite(result) && !is_infinite(source)));
  }
  // Whoever else writes there writes the same.
  __device__ __noinline__ void mark(u64 index) const {
    if (marks != nullptr) marks[index / per_mark] = 1;
  }
};

// One thread casts kCastWidth neighbours, with wide loads and stores where the addresses allow it.
template <typename Source, typename Target, bool through_bfloat16>
__device__ __forceinline__ void cast(const Source* from, u64 elements, Target* to, Marking marking) {
  constexpr u32 kWidth = pyint8::kCastWidth;
  const u64 thread = ((u64)blockIdx.x * kRows + threadIdx.y) * kTile + threadIdx.x;
  const u64 first = thread * kWidth;
  if (first >= elements) return;
  const bool is_aligned = (((u64)from | (u64)to) & 15) == 0;
  if (is_aligned && first + kWidth <= elements) {
    const Pack<Source> source = *reinterpret_cast<const Pack<Source>*>(from + first);
    Pack<Target> target;
    u32 marked = 0;  // a bit for each
#pragma unroll
    for (u32 i = 0; i < kWidth; ++i) {
      target.items[i] = Cast<Source, Target, through_bfloat16>::of(source.items[i]);
      marked |= (u32)marking.wants(source.items[i].value(), target.items[i].value()) << i;
    }
    *reinterpret_cast<Pack<Target>*>(to + first) = target;
    for (u64 i = first; marked != 0; ++i, marked >>= 1) {
      if (marked & 1) marking.mark(i);
    }
    return;
  }
  for (u64 i = first; i < first + kWidth && i < elements; ++i) {
    const Source source = from[i];
    const Target target = Cast<Source, Target, through_bfloat16>::of(source);
    to[i] = target;
    if (marking.wants(source.value(), target.value())) marking.mark(i);
  }
}

#define PYINT8_CAST(name, source, target, through_bfloat16)                                                  \
  extern "C" __global__ void __launch_bounds__(kTile* kRows) name(                                           \
      const source* from, u64 elements, target* to, unsigned char* marks, u64 per_mark, u64 overflow_only) { \
    cast<source, target, through_bfloat16>(from, elements, to, {marks, per_mark, overflow_only});            \
  }

PYINT8_CAST(cast_half_to_half, Half, Half, false)
PYINT8_CAST(cast_half_to_half_through_bfloat16, Half, Half, true)
PYINT8_CAST(cast_half_to_bfloat16, Half, BFloat16, false)
PYINT8_CAST(cast_half_to_float, Half, Float, false)
PYINT8_CAST(cast_bfloat16_to_half, BFloat16, Half, false)
PYINT8_CAST(cast_bfloat16_to_float, BFloat16, Float, false)
PYINT8_CAST(cast_float_to_half, Float, Half, false)
PYINT8_CAST(cast_float_to_half_through_bfloat16, Float, Half, true)
PYINT8_CAST(cast_float_to_bfloat16, Float, BFloat16, false)
