#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "numeric/cast.hpp"
#include "numeric/half.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

constexpr ElementType kTypes[] = {ElementType::kHalf, ElementType::kBFloat16, ElementType::kFloat};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::uint8_t kUnmarked = 0x5a;

// Bits of elements, in the lower half for those of 16 bits.
using Bits = std::vector<std::uint32_t>;

Bytes packed(ElementType type, const Bits& bits) {
  Bytes bytes(bits.size() * size_of(type));
  for (std::size_t i = 0; i < bits.size(); ++i) {
    std::memcpy(bytes.data() + i * size_of(type), &bits[i], size_of(type));  // little endian
  }
  return bytes;
}

Bits unpacked(ElementType type, const Bytes& bytes) {
  Bits bits(bytes.size() / size_of(type));
  for (std::size_t i = 0; i < bits.size(); ++i) {
    std::memcpy(&bits[i], bytes.data() + i * size_of(type), size_of(type));
  }
  return bits;
}

std::uintptr_t address_of(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data);
}

// Of no elements yet.
CastJob job_of(ElementType from, ElementType to, bool through = false, Marks marks = Marks::kNotFinite) {
  return {0, from, through, 0, 0, to, 0, 1, marks};
}

// What becomes of these elements.
Bits cast(CastJob job, const Bits& source) {
  const Bytes from = packed(job.type, source);
  Bytes to(source.size() * size_of(job.to_type));
  job.from = address_of(from.data());
  job.to = address_of(to.data());
  job.elements = source.size();
  pyint8::cast(job);
  return unpacked(job.to_type, to);
}

Bits every_pattern() {
  Bits bits(0x10000);
  for (std::uint32_t i = 0; i < bits.size(); ++i) bits[i] = i;
  return bits;
}

// About every value of 16 bits, and anywhere.
Bits many_floats() {
  Bits bits;
  for (std::uint32_t i = 0; i < 0x10000; ++i) {
    const auto half = std::bit_cast<std::uint32_t>(half_to_float(static_cast<std::uint16_t>(i)));
    for (const std::uint32_t about : {half, half + 0x1000, half + 0xfff, i << 16, (i << 16) + 0x8000}) {
      bits.push_back(about);
    }
  }
  Random random(4);
  for (int i = 0; i < 100000; ++i) bits.push_back(static_cast<std::uint32_t>(random()));
  return bits;
}

Bits sources_of(ElementType type) {
  return type == ElementType::kFloat ? many_floats() : every_pattern();
}

float value_of(ElementType type, std::uint32_t bits) {
  if (type == ElementType::kFloat) return std::bit_cast<float>(bits);
  const auto low = static_cast<std::uint16_t>(bits);
  return type == ElementType::kHalf ? half_to_float(low) : bfloat16_to_float(low);
}

std::uint32_t bits_of(ElementType type, float value) {
  if (type == ElementType::kFloat) return std::bit_cast<std::uint32_t>(value);
  return type == ElementType::kHalf ? float_to_half(value) : float_to_bfloat16(value);
}

std::uint32_t through_bfloat16(ElementType type, std::uint32_t bits) {
  const float value =
      value_of(type, bits);  // which is not rounded again where it is bfloat16: a NaN keeps its bits
  return float_to_half(type == ElementType::kBFloat16 ? value : bfloat16_to_float(float_to_bfloat16(value)));
}

template <typename Check>
void for_each_pair(const Check& check) {
  for (const ElementType from : kTypes) {
    for (const ElementType to : kTypes) {
      if (from == to && from != ElementType::kHalf) continue;
      CAPTURE(static_cast<int>(from));
      CAPTURE(static_cast<int>(to));
      check(from, to);
    }
  }
}

// The marks of a cast to fp16, one for every `per_mark` elements.
std::vector<std::uint8_t> marks_of(CastJob job, const Bits& source, std::size_t per_mark) {
  std::vector<std::uint8_t> marks(source.size() / per_mark + 2, kUnmarked);
  job.marks_at = address_of(marks.data());
  job.elements_per_mark = per_mark;
  cast(job, source);
  return marks;
}

// Whether one element on its own, an fp32, is marked.
bool is_marked(Marks marks, float value, bool through) {
  const CastJob job = job_of(ElementType::kFloat, ElementType::kHalf, through, marks);
  const std::uint8_t mark = marks_of(job, {std::bit_cast<std::uint32_t>(value)}, 1)[0];
  REQUIRE((mark == 1 || mark == kUnmarked));
  return mark == 1;
}

}  // namespace

TEST_CASE("every pair of dtypes, every pattern of bits: as one conversion after the other") {
  for_each_pair([](ElementType from, ElementType to) {
    const Bits source = sources_of(from);
    const Bits got = cast(job_of(from, to), source);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < source.size(); ++i) {
      const std::uint32_t expected = from == to ? source[i] : bits_of(to, value_of(from, source[i]));
      wrong += got[i] != expected;
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("a bfloat16 model's weights are rounded to it first") {
  for (const ElementType from : kTypes) {
    CAPTURE(static_cast<int>(from));
    const Bits source = sources_of(from);
    const Bits got = cast(job_of(from, ElementType::kHalf, true), source);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < source.size(); ++i) wrong += got[i] != through_bfloat16(from, source[i]);
    CHECK(wrong == 0);
  }
  const std::uint32_t tie = std::bit_cast<std::uint32_t>(1 + 0x1p-8F + 0x1p-11F);
  CHECK(cast(job_of(ElementType::kFloat, ElementType::kHalf), {tie})[0] == 0x3c04);
  CHECK(cast(job_of(ElementType::kFloat, ElementType::kHalf, true), {tie})[0] == 0x3c08);
}

TEST_CASE("fp16 may be cast in place: as it is, or rounded to bfloat16") {
  for (const bool through : {false, true}) {
    const Bits source = every_pattern();
    Bytes bytes = packed(ElementType::kHalf, source);
    std::vector<std::uint8_t> marks(source.size(), kUnmarked);
    CastJob job = job_of(ElementType::kHalf, ElementType::kHalf, through);
    job.from = job.to = address_of(bytes.data());
    job.elements = source.size();
    job.marks_at = address_of(marks.data());
    pyint8::cast(job);
    const Bits got = unpacked(ElementType::kHalf, bytes);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < source.size(); ++i) {
      wrong += got[i] != (through ? through_bfloat16(ElementType::kHalf, source[i]) : source[i]);
      wrong += (marks[i] == 1) == std::isfinite(value_of(ElementType::kHalf, got[i]));
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("what fp16 makes of a value is what is marked") {
  for (const bool through : {false, true}) {
    CHECK(is_marked(Marks::kNotFinite, std::numeric_limits<float>::quiet_NaN(), through));
    CHECK_FALSE(is_marked(Marks::kOverflow, std::numeric_limits<float>::quiet_NaN(), through));
    for (const float sign : {1.0F, -1.0F}) {
      CHECK(is_marked(Marks::kNotFinite, sign * kInfinity, through));
      CHECK_FALSE(is_marked(Marks::kOverflow, sign * kInfinity, through));
      for (const Marks marks : {Marks::kNotFinite, Marks::kOverflow}) {
        CHECK(is_marked(marks, sign * 65520, through));
        CHECK(is_marked(marks, sign * std::numeric_limits<float>::max(), through));
        CHECK(is_marked(marks, sign * 65504, through) == through);  // bfloat16's nearest is 65536
        CHECK_FALSE(is_marked(marks, sign * 65280, through));
        CHECK_FALSE(is_marked(marks, sign * 0, through));
      }
    }
  }
}

TEST_CASE("sources of 16 bits are marked by the same rule") {
  for (const ElementType from : {ElementType::kHalf, ElementType::kBFloat16}) {
    const Bits source = every_pattern();
    for (const Marks wanted : {Marks::kNotFinite, Marks::kOverflow}) {
      const auto marks = marks_of(job_of(from, ElementType::kHalf, false, wanted), source, 1);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < source.size(); ++i) {
        const float value = value_of(from, source[i]);
        const bool overflows = std::isfinite(value) && std::abs(value) > 65504;
        const bool expected = overflows || (wanted == Marks::kNotFinite && !std::isfinite(value));
        wrong += marks[i] != (expected ? 1 : kUnmarked);
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("rows have a mark each, and nothing is written for good ones") {
  for (const std::size_t columns : {1, 3, 7, 100}) {
    Bits source(12 * columns, 0x3c00);
    source[5 * columns] = 0x7c00;                // the first of its row
    source[8 * columns + columns - 1] = 0x7e01;  // the last of its row
    const auto marks = marks_of(job_of(ElementType::kHalf, ElementType::kHalf), source, columns);
    for (std::size_t row = 0; row < marks.size(); ++row) {
      CHECK(marks[row] == (row == 5 || row == 8 ? 1 : kUnmarked));
    }
  }
  const auto whole = marks_of(job_of(ElementType::kHalf, ElementType::kHalf), Bits(50, 0x7c00), 50);
  CHECK(whole == std::vector<std::uint8_t>{1, kUnmarked, kUnmarked});
}

TEST_CASE("nothing is written for no elements, or beyond the last") {
  const std::vector<std::uint16_t> from(9, 0x3c00);
  for (const std::size_t elements : {0, 1, 8}) {
    std::vector<std::uint16_t> to(9, 0xabcd);
    CastJob job = job_of(ElementType::kHalf, ElementType::kBFloat16);
    job.from = address_of(from.data());
    job.elements = elements;
    job.to = address_of(to.data());
    pyint8::cast(job);
    for (std::size_t i = 0; i < to.size(); ++i) CHECK(to[i] == (i < elements ? 0x3f80 : 0xabcd));
  }
}

TEST_CASE("casts that there are not, and marks that cannot be given, are refused") {
  const auto refused = [](const CastJob& job, const std::string& words) {
    const Error error = error_of([&] { pyint8::cast(job); });
    CHECK(error.code() == ErrorCode::kInvalidArgument);
    CHECK(contains(error.message(), words));
    CHECK(error_of([&] { validate(job); }).message() == error.message());
  };
  const auto marked = [](CastJob job, std::size_t per_mark) {
    job.marks_at = 1;
    job.elements_per_mark = per_mark;
    return job;
  };
  for (const ElementType to : {ElementType::kBFloat16, ElementType::kFloat}) {
    refused(job_of(ElementType::kHalf, to, true), "through bfloat16");
    refused(job_of(to, to), "are not cast");
    refused(marked(job_of(ElementType::kHalf, to), 1), "only a cast to fp16 has marks");
  }
  refused(marked(job_of(ElementType::kFloat, ElementType::kHalf), 0), "only a cast to fp16 has marks");
  refused(job_of(static_cast<ElementType>(7), ElementType::kHalf), "unknown element type 7");
  refused(job_of(ElementType::kHalf, static_cast<ElementType>(7)), "unknown element type 7");
}

}  // namespace pyint8::testing
