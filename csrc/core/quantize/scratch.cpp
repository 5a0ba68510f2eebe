#include "quantize/scratch.hpp"

#include <algorithm>

namespace pyint8 {

Scratch::Scratch(std::size_t nbytes) : size_(nbytes / kScratchAlignment * kScratchAlignment) {}

std::size_t Scratch::room_for(std::size_t nbytes) {
  const std::size_t blocks = nbytes / kScratchAlignment + (nbytes % kScratchAlignment == 0 ? 0 : 1);
  return std::max<std::size_t>(1, blocks) * kScratchAlignment;
}

std::optional<Scratch::Region> Scratch::acquire(std::size_t nbytes) {
  if (nbytes > size_) return std::nullopt;
  const std::size_t need = room_for(nbytes);
  const std::optional<std::size_t> start = fit(need);
  if (!start) return std::nullopt;
  entries_.push_back({*start, *start + need});
  next_ = *start + need;
  return oldest_ + entries_.size() - 1;
}

void Scratch::release(Region region) {
  entries_[region - oldest_].released = true;
  while (!entries_.empty() && entries_.front().released) {
    entries_.pop_front();
    ++oldest_;
  }
  if (entries_.empty()) next_ = 0;
}

// Free is what lies ahead of the newest region, up to the oldest or to the buffer's end, and then its
// beginning.
std::optional<std::size_t> Scratch::fit(std::size_t need) const {
  if (entries_.empty()) return need <= size_ ? std::optional<std::size_t>(0) : std::nullopt;
  const std::size_t oldest = entries_.front().start;
  const bool wrapped = next_ <= oldest;
  if (wrapped) return oldest - next_ >= need ? std::optional(next_) : std::nullopt;
  if (size_ - next_ >= need) return next_;
  return oldest >= need ? std::optional<std::size_t>(0) : std::nullopt;
}

}  // namespace pyint8
