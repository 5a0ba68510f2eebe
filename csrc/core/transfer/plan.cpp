#include "transfer/plan.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "error.hpp"

namespace pyint8 {
namespace {

constexpr std::uint64_t kMaxOffset = std::numeric_limits<std::int64_t>::max();  // of off_t

void check(const Range& range) {
  if (range.nbytes <= kMaxOffset && range.offset <= kMaxOffset - range.nbytes) return;
  throw Error(ErrorCode::kInvalidArgument, "a range of " + std::to_string(range.nbytes) +
                                               " bytes at offset " + std::to_string(range.offset) +
                                               " ends beyond 2^63");
}

void check(const PlanLimits& limits) {
  if (limits.alignment > 0 && limits.piece_bytes > 0 && limits.piece_bytes % limits.alignment == 0) return;
  throw Error(ErrorCode::kInvalidArgument, "a piece of " + std::to_string(limits.piece_bytes) +
                                               " bytes is no multiple of the alignment " +
                                               std::to_string(limits.alignment));
}

// Whether the byte at `offset` can join `piece`: it lies ahead, near, and with room behind it.
bool joins(const Piece& piece, std::uint32_t file, std::uint64_t offset, const PlanLimits& limits) {
  const std::uint64_t end = piece.offset + piece.needed;
  return piece.file == file && offset >= end && offset - end <= limits.max_gap &&
         offset - piece.offset < limits.piece_bytes;
}

}  // namespace

std::vector<Piece> make_plan(std::span<const Range> ranges, const PlanLimits& limits) {
  check(limits);
  std::vector<Piece> pieces;
  for (std::size_t index = 0; index < ranges.size(); ++index) {
    const Range& range = ranges[index];
    check(range);
    for (std::uint64_t done = 0; done < range.nbytes;) {
      const std::uint64_t offset = range.offset + done;
      if (pieces.empty() || !joins(pieces.back(), range.file, offset, limits)) {
        pieces.push_back({range.file, offset - offset % limits.alignment, 0, 0, {}});
      }
      Piece& piece = pieces.back();
      const std::size_t start = offset - piece.offset;
      const std::size_t nbytes = std::min<std::uint64_t>(range.nbytes - done, limits.piece_bytes - start);
      piece.segments.push_back({static_cast<std::uint32_t>(index), done, start, nbytes});
      piece.needed = start + nbytes;
      done += nbytes;
    }
  }
  for (Piece& piece : pieces) {
    piece.capacity = (piece.needed + limits.alignment - 1) / limits.alignment * limits.alignment;
  }
  return pieces;
}

}  // namespace pyint8
