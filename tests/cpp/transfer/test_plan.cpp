#include <limits>

#include "support.hpp"
#include "transfer/plan.hpp"

namespace pyint8::testing {
namespace {

std::size_t round_up(std::size_t value, std::size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// The first rule that one piece breaks, or nothing.
std::string broken_by(const Piece& piece, std::span<const Range> ranges, const PlanLimits& limits) {
  if (piece.segments.empty()) return "a piece brings something";
  if (piece.offset % limits.alignment != 0) return "a piece is aligned";
  if (piece.segments.front().piece_offset >= limits.alignment) return "it begins no earlier than it must";
  std::size_t end = piece.segments.front().piece_offset;
  for (const Segment& segment : piece.segments) {
    const Range& range = ranges[segment.range];
    const std::uint64_t offset = range.offset + segment.range_offset;
    if (segment.nbytes == 0) return "no segment is empty";
    if (piece.file != range.file) return "a piece is of one file";
    if (piece.offset + segment.piece_offset != offset) return "a segment lies where its range does";
    if (segment.piece_offset < end) return "segments do not overlap";
    if (segment.piece_offset - end > limits.max_gap) return "no gap is larger than the limit";
    end = segment.piece_offset + segment.nbytes;
  }
  if (piece.needed != end) return "what is needed ends with the last segment";
  if (piece.capacity != round_up(end, limits.alignment)) return "the capacity is what is needed, aligned";
  if (piece.capacity > limits.piece_bytes) return "no piece is larger than the limit";
  return "";
}

// The same for a plan. Segments, in order, must be the ranges' bytes, in order: each exactly once.
std::string broken_by_plan(std::span<const Range> ranges, const PlanLimits& limits) {
  std::size_t range = 0;
  std::uint64_t done = 0;
  for (const Piece& piece : make_plan(ranges, limits)) {
    if (const std::string rule = broken_by(piece, ranges, limits); !rule.empty()) return rule;
    for (const Segment& segment : piece.segments) {
      for (; range < ranges.size() && done == ranges[range].nbytes; ++range) done = 0;
      if (range == ranges.size() || segment.range != range) return "ranges come in order, none left out";
      if (segment.range_offset != done) return "bytes come in order, none left out or twice";
      done += segment.nbytes;
      if (done > ranges[range].nbytes) return "no byte beyond its range";
    }
  }
  for (; range < ranges.size(); ++range, done = 0) {
    if (done != ranges[range].nbytes) return "every byte comes";
  }
  return "";
}

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
