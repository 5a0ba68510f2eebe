// Whatever ranges and limits: an error that says which of them makes no sense, or a plan that keeps every
// rule.
#include <cstdint>
#include <limits>
#include <vector>

#include "error.hpp"
#include "input.hpp"
#include "plan_rules.hpp"

namespace pyint8::testing {
namespace {

constexpr std::uint64_t kMostOffset = std::numeric_limits<std::int64_t>::max();
constexpr std::uint64_t kMostPieces =
    20000;  // callers check ranges against the file; here memory is the bound

PlanLimits limits_from(Input& input) {
  if (input.once_in(8)) return {input.number<std::size_t>(), input.number<std::size_t>(), input.pick(0, 99)};
  const std::size_t alignment = std::size_t{1} << input.pick(0, 12);
  return {alignment * input.pick(1, 40), alignment, input.once_in(2) ? input.number<std::uint16_t>() : 0u};
}

Range range_from(Input& input, std::uint64_t end) {
  const auto file = static_cast<std::uint32_t>(input.pick(0, 5) / 4);
  switch (input.pick(0, 5)) {
    case 0:
      return {file, input.number<std::uint64_t>(), input.number<std::uint64_t>()};
    case 1:
      return {file, kMostOffset - input.number<std::uint16_t>(), input.number<std::uint16_t>()};
    case 2:
      return {file, input.number<std::uint32_t>(), input.number<std::uint16_t>()};
    default:
      return {file, end + input.pick(0, 3) * input.pick(0, 50), input.number<std::uint16_t>()};
  }
}

bool makes_sense(const PlanLimits& limits) {
  return limits.alignment != 0 && limits.piece_bytes != 0 && limits.piece_bytes % limits.alignment == 0;
}

bool makes_sense(const Range& range) {
  return range.nbytes <= kMostOffset && range.offset <= kMostOffset - range.nbytes;
}

std::uint64_t pieces_of(const Range& range, const PlanLimits& limits) {
  return makes_sense(limits) && makes_sense(range) ? range.nbytes / limits.piece_bytes : 0;
}

std::vector<Range> ranges_from(Input& input, const PlanLimits& limits) {
  std::vector<Range> ranges;
  std::uint64_t pieces = 0;
  while (!input.empty()) {
    const std::uint64_t end = ranges.empty() ? 0 : ranges.back().offset + ranges.back().nbytes;
    const Range range = range_from(input, end);
    pieces += pieces_of(range, limits);
    if (pieces > kMostPieces) break;
    ranges.push_back(range);
  }
  return ranges;
}

}  // namespace

void fuzz(Input& input) {
  const PlanLimits limits = limits_from(input);
  const std::vector<Range> ranges = ranges_from(input, limits);
  bool all = makes_sense(limits);
  for (const Range& range : ranges) all = all && makes_sense(range);
  try {
    const std::string rule = broken_by_plan(ranges, limits);
    require(all, "what makes no sense is refused");
    require(rule.empty(), rule);
  } catch (const Error& error) {
    require(!all, "what makes sense is planned");
    require(error.code() == ErrorCode::kInvalidArgument, "the error is of the caller's values");
  }
}

}  // namespace pyint8::testing
