// From requested ranges to the reads of a worker, as plain data: pure, so that it can be tested on its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace pyint8 {

// No checksum.
inline constexpr std::uint32_t kUnchecked = 0xffffffff;

// Where ranks share out what they read: the number for a rank's own parts, by that for what all read.
inline std::uint32_t checksum_of_parts(std::uint32_t checksum) {
  return checksum == kUnchecked ? kUnchecked : checksum + 1;
}

// A requested range of a file.
struct Range {
  std::uint32_t file;
  std::uint64_t offset;
  std::uint64_t nbytes;
  std::uint32_t checksum = kUnchecked;  // the number of the one that its bytes are part of
};

// The part of a piece that belongs to one range.
struct Segment {
  std::uint32_t range;         // index into the ranges that were planned
  std::uint64_t range_offset;  // first byte within that range
  std::size_t piece_offset;    // first byte within the piece
  std::size_t nbytes;
};

// One read of at most `PlanLimits::piece_bytes`.
struct Piece {
  std::uint32_t file;
  std::uint64_t offset;  // a multiple of the alignment
  std::size_t needed;    // bytes up to the end of the last segment
  std::size_t capacity;  // `needed`, rounded up to the alignment: what may be asked of the file
  std::vector<Segment> segments;
};

struct PlanLimits {
  std::size_t piece_bytes;
  std::size_t alignment = 1;  // of a piece's offset and capacity; divides piece_bytes
  std::size_t max_gap = 0;    // unwanted bytes read through to join two ranges in one piece
};

// Cuts and joins `ranges`, keeping their order. Every byte of every range is in exactly one segment; an empty
// range is in none. Neighbours in the list that are near each other in the file share a piece. Throws
// kInvalidArgument for a range that ends beyond 2^63 or limits that make no sense.
std::vector<Piece> make_plan(std::span<const Range> ranges, const PlanLimits& limits);

}  // namespace pyint8
