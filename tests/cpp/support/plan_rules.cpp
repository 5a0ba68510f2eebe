#include "plan_rules.hpp"

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

}  // namespace

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

}  // namespace pyint8::testing
