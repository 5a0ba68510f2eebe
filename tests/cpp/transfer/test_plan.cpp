#include <limits>

#include "plan_rules.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

PlanLimits random_limits(Random& random) {
  const std::size_t alignment = std::size_t{1} << pick(random, 0, 6);
  return {.piece_bytes = alignment * pick(random, 1, 40),
          .alignment = alignment,
          .max_gap = pick(random, 0, 1) * pick(random, 0, 100)};
}

// Much as checkpoints are: mostly forward and near, sometimes backward, overlapping, empty or in another
// file.
std::vector<Range> random_ranges(Random& random) {
  std::vector<Range> ranges(pick(random, 0, 30));
  std::uint32_t file = 0;
  std::uint64_t offset = pick(random, 0, 1000);
  for (Range& range : ranges) {
    if (pick(random, 0, 9) == 0) file = static_cast<std::uint32_t>(pick(random, 0, 2));
    if (pick(random, 0, 4) == 0) offset = pick(random, 0, 3000);
    const std::uint64_t nbytes = pick(random, 0, 5) == 0 ? 0 : pick(random, 1, pick(random, 1, 800));
    range = {file, offset + pick(random, 0, 2) * pick(random, 0, 80), nbytes};
    offset = range.offset + range.nbytes;
  }
  return ranges;
}

}  // namespace

TEST_CASE("whatever the ranges and limits, every byte is in exactly one segment and every rule is kept") {
  Random random(20240601);
  for (int i = 0; i < 20000; ++i) {
    CAPTURE(i);
    const PlanLimits limits = random_limits(random);
    REQUIRE(broken_by_plan(random_ranges(random), limits) == "");
  }
}

TEST_CASE("neighbours share a piece; what is far, behind or in another file does not") {
  const PlanLimits limits = {.piece_bytes = 1000, .max_gap = 10};
  const auto pieces = [&](std::vector<Range> ranges) { return make_plan(ranges, limits).size(); };
  CHECK(pieces({{0, 0, 100}, {0, 100, 100}}) == 1);
  CHECK(pieces({{0, 0, 100}, {0, 110, 100}}) == 1);
  CHECK(pieces({{0, 0, 100}, {0, 111, 100}}) == 2);
  CHECK(pieces({{0, 0, 100}, {0, 99, 100}}) == 2);
  CHECK(pieces({{0, 100, 100}, {0, 0, 100}}) == 2);
  CHECK(pieces({{0, 0, 100}, {1, 100, 100}}) == 2);
  CHECK(pieces({{0, 0, 100}, {0, 5000, 0}, {0, 100, 100}}) == 1);  // an empty range parts nothing
  CHECK(pieces({}) == 0);
  CHECK(pieces({{0, 7, 0}, {3, 0, 0}}) == 0);
}

TEST_CASE("a long range is cut at the size of a piece, and shares its ends with its neighbours") {
  const std::vector<Range> ranges = {{0, 4090, 10}, {0, 4100, 3 * 8192}, {0, 4100 + 3 * 8192, 5}};
  const auto pieces = make_plan(ranges, {.piece_bytes = 8192, .alignment = 4096});
  REQUIRE(pieces.size() == 4);
  CHECK(pieces[0].offset == 0);
  CHECK(pieces[0].capacity == 8192);
  CHECK(pieces[0].segments.size() == 2);
  CHECK(pieces[3].offset == 3 * 8192);
  CHECK(pieces[3].needed == 4105);
  CHECK(pieces[3].capacity == 8192);
  CHECK(pieces[3].segments.size() == 2);
}

TEST_CASE("a range that ends beyond 2^63 is refused") {
  constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
  constexpr std::uint64_t kAll = std::numeric_limits<std::uint64_t>::max();
  const PlanLimits limits = {.piece_bytes = std::size_t{1} << 60};
  for (const Range& range : {Range{0, kMost, 1}, Range{0, 1, kMost}, Range{0, kAll, kAll}, Range{0, kAll, 0},
                             Range{0, 0, kMost + 1}, Range{0, kAll - 4, 5}}) {
    const Error error = error_of([&] { make_plan(std::vector{range}, limits); });
    CHECK(error.code() == ErrorCode::kInvalidArgument);
    CHECK(contains(error.message(), "ends beyond 2^63"));
    CHECK(contains(error.message(), std::to_string(range.offset)));
  }
  const std::vector<Range> just_possible = {{0, kMost - 5, 5}, {0, kMost, 0}, {0, 0, kMost}};
  CHECK(broken_by_plan(just_possible, limits) == "");
}

TEST_CASE("limits that make no sense are refused") {
  for (const PlanLimits& limits : {PlanLimits{.piece_bytes = 0}, PlanLimits{.piece_bytes = 8, .alignment = 0},
                                   PlanLimits{.piece_bytes = 10, .alignment = 4}}) {
    const Error error = error_of([&] { make_plan({}, limits); });
    CHECK(error.code() == ErrorCode::kInvalidArgument);
    CHECK(contains(error.message(), "no multiple of the alignment"));
  }
}

}  // namespace pyint8::testing
