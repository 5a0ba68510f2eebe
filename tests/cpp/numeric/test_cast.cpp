#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "numeric/cast.hpp"
#include "numeric/half.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

std::uintptr_t address_of(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data);
}

std::vector<std::uint16_t> every_pattern() {
  std::vector<std::uint16_t> patterns(1 << 16);
  std::iota(patterns.begin(), patterns.end(), std::uint16_t{0});
  return patterns;
}

// The marks of these values when they are cast to fp16, one for every `per_mark`.
std::vector<std::uint8_t> marks_of(const std::vector<float>& values, std::size_t per_mark, Marks marks) {
  std::vector<std::uint16_t> half(values.size());
  std::vector<std::uint8_t> found((values.size() + per_mark - 1) / per_mark);
  cast({.from = address_of(values.data()),
        .type = ElementType::kFloat,
        .through_bfloat16 = false,
        .elements = values.size(),
        .to = address_of(half.data()),
        .to_type = ElementType::kHalf,
        .marks_at = address_of(found.data()),
        .elements_per_mark = per_mark,
        .marks = marks});
  return found;
}

}  // namespace

TEST_CASE("every 16-bit pattern is cast as its scalar conversion casts it") {
  const std::vector<std::uint16_t> source = every_pattern();
  std::vector<std::uint16_t> narrow(source.size());
  std::vector<float> wide(source.size());
  const auto from = address_of(source.data());
  cast({from, ElementType::kBFloat16, false, source.size(), address_of(narrow.data()), ElementType::kHalf});
  for (std::size_t i = 0; i < source.size(); ++i) {
    REQUIRE(narrow[i] == float_to_half(bfloat16_to_float(source[i])));
  }
  cast({from, ElementType::kHalf, false, source.size(), address_of(narrow.data()), ElementType::kBFloat16});
  for (std::size_t i = 0; i < source.size(); ++i) {
    REQUIRE(narrow[i] == float_to_bfloat16(half_to_float(source[i])));
  }
  cast({from, ElementType::kHalf, true, source.size(), address_of(narrow.data()), ElementType::kHalf});
  for (std::size_t i = 0; i < source.size(); ++i) {
    const float rounded = bfloat16_to_float(float_to_bfloat16(half_to_float(source[i])));
    REQUIRE(narrow[i] == float_to_half(rounded));
  }
  cast({from, ElementType::kBFloat16, false, source.size(), address_of(wide.data()), ElementType::kFloat});
  for (std::size_t i = 0; i < source.size(); ++i) {
    const float value = bfloat16_to_float(source[i]);
    REQUIRE((wide[i] == value || (std::isnan(wide[i]) && std::isnan(value))));
  }
}

TEST_CASE("values that have the dtype keep their bits, in place or not") {
  std::vector<std::uint16_t> source = every_pattern(), copy(source.size());
  const auto from = address_of(source.data());
  cast({from, ElementType::kHalf, false, source.size(), address_of(copy.data()), ElementType::kHalf});
  CHECK(copy == every_pattern());
  cast({from, ElementType::kHalf, false, source.size(), from, ElementType::kHalf});
  CHECK(source == every_pattern());
}

TEST_CASE("marks are set where a value is not finite, or only where that is new") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> values = {1, 65504,     65519, 2,          65520, 3,   -1e30f,
                                     4, kInfinity, 5,     -kInfinity, 6,     kNan};
  const std::vector<std::uint8_t> any = {0, 0, 1, 1, 1, 1, 1};
  const std::vector<std::uint8_t> fresh = {0, 0, 1, 1, 0, 0, 0};
  CHECK(marks_of(values, 2, Marks::kNotFinite) == any);
  CHECK(marks_of(values, 2, Marks::kOverflow) == fresh);
  CHECK(marks_of(values, values.size(), Marks::kOverflow) == std::vector<std::uint8_t>{1});
}

TEST_CASE("casts that there are not are refused") {
  const auto refused = [](const CastJob& job) {
    return error_of([&] { validate(job); }).code() == ErrorCode::kInvalidArgument;
  };
  CHECK(refused({0, ElementType::kFloat, true, 1, 0, ElementType::kBFloat16}));
  CHECK(refused({0, ElementType::kFloat, false, 1, 0, ElementType::kFloat}));
  CHECK(refused({0, ElementType::kBFloat16, false, 1, 0, ElementType::kBFloat16}));
  CHECK(refused({0, ElementType::kHalf, false, 1, 0, ElementType::kFloat, 8}));
  CHECK(refused({0, ElementType::kFloat, false, 1, 0, ElementType::kHalf, 8, 0}));
}

}  // namespace pyint8::testing
