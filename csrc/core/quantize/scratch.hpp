// Bookkeeping of a fixed buffer that bands pass through in about the order they came: pure arithmetic.
#pragma once

#include <cstddef>
#include <deque>
#include <optional>

namespace pyint8 {

// Of every region's start and size: what a GPU's widest loads keep to.
inline constexpr std::size_t kScratchAlignment = 256;

class Scratch {
 public:
  // A region of the buffer, until it is released.
  using Region = std::size_t;  // its number; they count up

  explicit Scratch(std::size_t nbytes);

  std::size_t size() const { return size_; }
  // What a region for so many bytes takes.
  static std::size_t room_for(std::size_t nbytes);

  // Room for `nbytes`: where in the buffer it starts is `start_of`. Nothing while there is none.
  std::optional<Region> acquire(std::size_t nbytes);
  std::size_t start_of(Region region) const { return at(region).start; }
  // In any order; the room is free again once all older regions are released too.
  void release(Region region);

 private:
  struct Entry {
    std::size_t start;
    std::size_t end;
    bool released = false;
  };

  const Entry& at(Region region) const { return entries_[region - oldest_]; }
  std::optional<std::size_t> fit(std::size_t need) const;

  std::size_t size_;
  std::deque<Entry> entries_;  // of the regions from `oldest_` on
  Region oldest_ = 0;
  std::size_t next_ = 0;  // where the newest region ends
};

}  // namespace pyint8
