// What one of several ranks reads of bytes that all of them get: pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyint8 {

struct Share {
  std::uint32_t rank = 0;  // among
  std::uint32_t ranks = 1;
  std::size_t least_bytes = 0;  // all read whole what is smaller

  // The bytes that each rank reads of `nbytes`, one rank's behind the other's; all read what is behind the
  // last. 0: all read them whole.
  std::size_t part_of(std::size_t nbytes) const;

  struct Span {
    std::size_t begin, end;
    bool is_part;  // of which each rank has another; else all read these bytes
  };
  // What this rank reads of them.
  std::vector<Span> spans_of(std::size_t nbytes) const;
};

// Throws kInvalidArgument for a rank that there is not.
void validate(const Share& share);

}  // namespace pyint8
