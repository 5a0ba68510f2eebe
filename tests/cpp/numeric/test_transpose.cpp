#include <cstring>
#include <limits>

#include "numeric/half.hpp"
#include "numeric/transpose.hpp"
#include "pread.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

constexpr std::uint16_t kUntouched = 0xabcd;

std::uint16_t expected(const TransposeJob& job, std::size_t r, std::size_t c) {
  const std::byte* element =
      reinterpret_cast<const std::byte*>(job.from) + (r * job.columns + c) * size_of(job.type);
  std::uint16_t bits = 0;
  float value = 0;
  if (job.type == ElementType::kFloat) {
    std::memcpy(&value, element, sizeof value);
  } else {
    std::memcpy(&bits, element, sizeof bits);
    value = job.type == ElementType::kHalf ? half_to_float(bits) : bfloat16_to_float(bits);
    if (job.type == ElementType::kHalf && !job.through_bfloat16) return bits;  // signalling NaN and all
  }
  const bool rounds = job.through_bfloat16 && job.type != ElementType::kBFloat16;
  return float_to_half(rounds ? bfloat16_to_float(float_to_bfloat16(value)) : value);
}

void check_transposition(ElementType type, bool through_bfloat16, std::size_t rows, std::size_t columns,
                         std::size_t padding, std::size_t threads) {
  CAPTURE(static_cast<int>(type));
  CAPTURE(through_bfloat16);
  CAPTURE(rows);
  CAPTURE(columns);
  CAPTURE(padding);
  CAPTURE(threads);
  const Bytes source = random_bytes(rows * columns * size_of(type), rows * 1000 + columns);
  const std::size_t stride = rows + padding;
  std::vector<std::uint16_t> to(columns * stride + 1, kUntouched);
  const TransposeJob job = {
      reinterpret_cast<std::uintptr_t>(source.data()), type,  through_bfloat16, rows, columns,
      reinterpret_cast<std::uintptr_t>(to.data()),     stride};
  transpose_to_half(job, threads);
  std::size_t wrong = 0;
  for (std::size_t c = 0; c < columns; ++c) {
    for (std::size_t r = 0; r < stride; ++r) {
      wrong += to[c * stride + r] != (r < rows ? expected(job, r, c) : kUntouched);
    }
  }
  REQUIRE(wrong == 0);
  REQUIRE(to.back() == kUntouched);
}

template <typename Check>
void for_each_type(const Check& check) {
  for (const ElementType type : {ElementType::kHalf, ElementType::kBFloat16, ElementType::kFloat}) {
    for (const bool through_bfloat16 : {false, true}) check(type, through_bfloat16);
  }
}

}  // namespace

TEST_CASE("any shape about the sizes of a block and a tile, with and without padding") {
  const std::size_t sizes[] = {0, 1, 2, 7, 8, 9, 31, 63, 64, 65, 71, 128, 130};
  for_each_type([&](ElementType type, bool through_bfloat16) {
    for (const std::size_t rows : sizes) {
      for (const std::size_t columns : sizes) {
        check_transposition(type, through_bfloat16, rows, columns, (rows + columns) % 3, 1 + rows % 3);
      }
    }
  });
}

TEST_CASE("threads share a large weight, and leave no seam between them") {
  for_each_type([](ElementType type, bool through_bfloat16) {
    for (const std::size_t threads : {1, 2, 3, 7, 100}) {
      check_transposition(type, through_bfloat16, 1001, 777, 5, threads);
    }
  });
  check_transposition(ElementType::kFloat, false, 300000, 3, 0, 8);  // more threads than tiles
  check_transposition(ElementType::kFloat, false, 3, 300000, 0, 8);
}

TEST_CASE("random shapes") {
  Random random(11);
  for (int i = 0; i < 60; ++i) {
    for_each_type([&](ElementType type, bool through_bfloat16) {
      check_transposition(type, through_bfloat16, pick(random, 0, 150), pick(random, 0, 150),
                          pick(random, 0, 40), pick(random, 0, 4));
    });
  }
}

TEST_CASE("where the operating system refuses threads, fewer do the work") {
  for (const int left : {0, 1, 2}) {
    threads_left = left;
    check_transposition(ElementType::kBFloat16, false, 1001, 777, 5, 4);
  }
  threads_left = -1;
}

TEST_CASE("a threaded transposition leaves no thread behind") {
  const std::size_t before = running_threads();
  check_transposition(ElementType::kBFloat16, false, 1024, 1024, 0, 4);
  CHECK(threads_become(before));
}

TEST_CASE("a stride too small, a size that overflows and an unknown type are refused") {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
  const auto refused = [](const TransposeJob& job, const std::string& words) {
    const Error error = error_of([&] { transpose_to_half(job, 1); });
    CHECK(error.code() == ErrorCode::kInvalidArgument);
    CHECK(contains(error.message(), words));
  };
  refused({0, ElementType::kHalf, false, 8, 4, 0, 7}, "a destination stride of 7 cannot hold 8 columns");
  refused({0, ElementType::kHalf, false, 1, kMost, 0, 1}, "too large");
  refused({0, ElementType::kHalf, false, std::size_t{1} << 32, std::size_t{1} << 32, 0, std::size_t{1} << 32},
          "too large");
  refused({0, ElementType::kHalf, false, 1, 2, 0, kMost}, "too large");
  refused({0, static_cast<ElementType>(7), false, 1, 1, 0, 1}, "unknown element type 7");
  CHECK(size_of(ElementType::kHalf) == 2);
  CHECK(size_of(ElementType::kBFloat16) == 2);
  CHECK(size_of(ElementType::kFloat) == 4);
}

}  // namespace pyint8::testing
