#include <cmath>
#include <limits>

#include "numeric/half.hpp"
#include "support.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyint8::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The nearest value of `digits` binary digits that is a multiple of 2^least, ties to even: the definition,
// in arithmetic that is exact.
double nearest(float value, int digits, int least) {
  int exponent = 0;
  std::frexp(value, &exponent);
  const int step = std::max(exponent - digits, least);
  return std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(value), -step)), step);
}

float nearest_half(float value) {
  const double rounded = nearest(value, 11, -24);
  return std::copysign(std::abs(rounded) > 65504 ? kInfinity : static_cast<float>(std::abs(rounded)), value);
}

float nearest_bfloat16(float value) {
  const double rounded = nearest(value, 8, -133);
  return std::copysign(std::abs(rounded) > 0x1.fep127 ? kInfinity : static_cast<float>(std::abs(rounded)),
                       value);
}

bool same_bits(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

bool rounds_well(float value) {
  const float as_half = half_to_float(float_to_half(value));
  const float as_bfloat16 = bfloat16_to_float(float_to_bfloat16(value));
  if (std::isnan(value)) return std::isnan(as_half) && std::isnan(as_bfloat16);
  if (std::isinf(value)) return as_half == value && as_bfloat16 == value;
  return same_bits(as_half, nearest_half(value)) && same_bits(as_bfloat16, nearest_bfloat16(value));
}

// Whether `value` and all that lies about it does, where rounding could go the wrong way.
bool rounds_well_about(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  for (const std::uint32_t half_step : {0x1000u, 0x8000u}) {  // of fp16 and of bf16
    for (const std::uint32_t centre : {bits, bits + half_step, bits - half_step}) {
      for (const std::uint32_t near : {centre - 1, centre, centre + 1}) {
        if (!rounds_well(std::bit_cast<float>(near))) return false;
      }
    }
  }
  return true;
}

}  // namespace

TEST_CASE("every fp16 has the value of its fields, and comes back") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    CAPTURE(bits);
    const auto half = static_cast<std::uint16_t>(bits);
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const auto mantissa = static_cast<float>(bits & 0x3ff);
    const float sign = (bits & 0x8000) != 0 ? -1.0F : 1.0F;
    const float value = half_to_float(half);
    if (exponent == 31 && mantissa != 0) {
      REQUIRE(std::isnan(value));
      REQUIRE(float_to_half(value) == (half | 0x200));  // quiet, with its payload
      continue;
    }
    float expected = kInfinity;
    if (exponent == 0) expected = std::ldexp(mantissa, -24);
    if (exponent > 0 && exponent < 31) expected = std::ldexp(1024 + mantissa, exponent - 25);
    REQUIRE(same_bits(value, sign * expected));
    REQUIRE(float_to_half(value) == half);
  }
}

TEST_CASE("every bf16 is the upper half of an fp32, and comes back") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    CAPTURE(bits);
    const float value = bfloat16_to_float(static_cast<std::uint16_t>(bits));
    REQUIRE(std::bit_cast<std::uint32_t>(value) == bits << 16);
    REQUIRE(float_to_bfloat16(value) == (std::isnan(value) ? 0x7fc0 : bits));
  }
}

TEST_CASE("fp32 rounds to the nearest, ties to even: about every fp16, every bf16, and anywhere") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    CAPTURE(bits);
    REQUIRE(rounds_well_about(half_to_float(static_cast<std::uint16_t>(bits))));
    REQUIRE(rounds_well_about(bfloat16_to_float(static_cast<std::uint16_t>(bits))));
  }
  Random random(1);
  for (int i = 0; i < 300000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random());
    CAPTURE(bits);
    REQUIRE(rounds_well(std::bit_cast<float>(bits)));
  }
}

TEST_CASE("the edges, by their bits") {
  CHECK(float_to_half(65504.0F) == 0x7bff);
  CHECK(float_to_half(65519.996F) == 0x7bff);
  CHECK(float_to_half(65520.0F) == 0x7c00);
  CHECK(float_to_half(-1e38F) == 0xfc00);
  CHECK(float_to_half(0x1p-14F) == 0x0400);    // the least normal
  CHECK(float_to_half(0x1p-24F) == 0x0001);    // the least subnormal
  CHECK(float_to_half(0x1p-25F) == 0x0000);    // half of it: to even
  CHECK(float_to_half(0x1.8p-24F) == 0x0002);  // a tie above it: to even
  CHECK(float_to_half(-0.0F) == 0x8000);
  CHECK(float_to_half(0x1.ffcp-15F) == 0x0400);  // subnormal that rounds up to normal
  CHECK(float_to_bfloat16(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(float_to_bfloat16(std::bit_cast<float>(0x7f800001u)) == 0x7fc0);  // NaN does not become infinity
}

#if defined(__x86_64__)
namespace {

__attribute__((target("f16c"))) std::uint16_t by_instruction(float value) {
  const __m128i bits = _mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT);
  return static_cast<std::uint16_t>(_mm_extract_epi16(bits, 0));
}

}  // namespace

TEST_CASE("subnormals are kept in a process that flushes them, as torch's casts keep them") {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);             // as torch.set_flush_denormal(True) does
  const volatile std::uint16_t least = 1;  // volatile: not converted by the compiler
  const float value = half_to_float(least);
  const std::uint16_t bits = float_to_half(value);
  _mm_setcsr(before);
  CHECK(value == 0x1p-24F);
  CHECK(bits == 0x0001);
}

TEST_CASE("the processor's own conversion gives the same bits, NaN included") {
  if (!__builtin_cpu_supports("f16c")) return;
  Random random(2);
  for (int i = 0; i < 1000000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    REQUIRE(float_to_half(value) == by_instruction(value));
  }
}
#endif

}  // namespace pyint8::testing
