// Eight 16-bit elements in a register, by the names that x86-64 (SSE2) and aarch64 share; PYINT8_SIMD says
// that there are.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#define PYINT8_SIMD 1

namespace pyint8::simd {

using Eight = __m128i;

inline Eight load(const std::uint16_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
inline void store(std::uint16_t* to, Eight value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
}
// The lower or upper halves of both, interleaved by elements of 16, 32 or 64 bits.
inline Eight low16(Eight a, Eight b) {
  return _mm_unpacklo_epi16(a, b);
}
inline Eight high16(Eight a, Eight b) {
  return _mm_unpackhi_epi16(a, b);
}
inline Eight low32(Eight a, Eight b) {
  return _mm_unpacklo_epi32(a, b);
}
inline Eight high32(Eight a, Eight b) {
  return _mm_unpackhi_epi32(a, b);
}
inline Eight low64(Eight a, Eight b) {
  return _mm_unpacklo_epi64(a, b);
}
inline Eight high64(Eight a, Eight b) {
  return _mm_unpackhi_epi64(a, b);
}

}  // namespace pyint8::simd

#elif defined(__aarch64__)
#include <arm_neon.h>
#define PYINT8_SIMD 1

namespace pyint8::simd {

using Eight = uint16x8_t;

inline uint32x4_t as32(Eight a) {
  return vreinterpretq_u32_u16(a);
}
inline uint64x2_t as64(Eight a) {
  return vreinterpretq_u64_u16(a);
}

inline Eight load(const std::uint16_t* from) {
  return vld1q_u16(from);
}
inline void store(std::uint16_t* to, Eight value) {
  vst1q_u16(to, value);
}
inline Eight low16(Eight a, Eight b) {
  return vzip1q_u16(a, b);
}
inline Eight high16(Eight a, Eight b) {
  return vzip2q_u16(a, b);
}
inline Eight low32(Eight a, Eight b) {
  return vreinterpretq_u16_u32(vzip1q_u32(as32(a), as32(b)));
}
inline Eight high32(Eight a, Eight b) {
  return vreinterpretq_u16_u32(vzip2q_u32(as32(a), as32(b)));
}
inline Eight low64(Eight a, Eight b) {
  return vreinterpretq_u16_u64(vzip1q_u64(as64(a), as64(b)));
}
inline Eight high64(Eight a, Eight b) {
  return vreinterpretq_u16_u64(vzip2q_u64(as64(a), as64(b)));
}

}  // namespace pyint8::simd
#endif
