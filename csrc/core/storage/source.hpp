// Where bytes come from: the interface that the engine reads through.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyint8 {

// What O_DIRECT demands of offsets, lengths and addresses on every file system seen so far.
inline constexpr std::size_t kDirectAlignment = 4096;

class Source {
 public:
  virtual ~Source() = default;

  // Reads up to `capacity` bytes at `offset` into `out` and returns once at least `needed` have arrived.
  // Called by several threads at once. Throws kTruncated where the source ends before, kIo on any other
  // failure.
  virtual void read_at(std::byte* out, std::size_t needed, std::size_t capacity,
                       std::uint64_t offset) const = 0;

  // Throws kChanged if what it reads from is in another state than when it was opened.
  virtual void require_unchanged() const = 0;

  // Lets reads under way fail soon, for nobody waits for what they bring. Files have no need of it.
  virtual void cancel() const noexcept {}
};

}  // namespace pyint8
