#include "transfer/ring.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace pyint8 {
namespace {

// Less than the slots that are on their way together take on the bus.
constexpr std::chrono::microseconds kPollInterval{50};

}  // namespace

Ring::Ring(std::byte* memory, std::size_t slot_bytes, std::size_t slots, bool timed) : slots_(slots) {
  for (Slot& slot : slots_) {
    slot.timed_ = timed;
    slot.data_ = std::exchange(memory, memory + slot_bytes);
    free_.push_back(&slot);
  }
}

void Ring::Slot::mark(Road& road, std::size_t lane, std::size_t number, double issued, std::uint64_t nbytes) {
  Event& end = event_on(road, lane * kMostRoads + number);
  road.record(end);
  copied_ = {lane, number, &end, issued, nbytes};
  in_flight_ = &end;
}

Event& Ring::Slot::event_on(Road& road, std::size_t way) {
  if (events_.size() <= way) events_.resize(way + 1);
  if (events_[way] == nullptr && timed_) events_[way] = road.make_timed_event();
  if (events_[way] == nullptr) events_[way] = road.make_event();
  return *events_[way];
}

// Events are polled: one that a thread can sleep for interrupts the CPU when it passes, and holds up the
// copies behind it.
std::optional<std::size_t> Ring::wait_for_empty() {
  Slot* slot = find_empty();
  for (; slot == nullptr; slot = find_empty()) std::this_thread::sleep_for(kPollInterval);
  if (std::exchange(slot->in_flight_, nullptr) == nullptr) return std::nullopt;
  emptied_ = slot->copied_;
  return emptied_.lane;
}

std::vector<Ring::Copied> Ring::under_way() const {
  std::vector<Copied> found;
  for (const Slot& slot : slots_) {
    if (slot.in_flight_ != nullptr) found.push_back(slot.copied_);
  }
  return found;
}

// Copies on one road pass in order, so only the oldest is asked for; between roads, any may be the first.
Ring::Slot* Ring::find_empty() {
  for (auto at = free_.begin(); at != free_.end(); ++at) {
    Slot& slot = **at;
    if (slot.in_flight_ == nullptr) return &slot;
    const auto is_older = [&](const Slot* other) {
      return other->copied_.lane == slot.copied_.lane && other->copied_.road == slot.copied_.road;
    };
    if (std::none_of(free_.begin(), at, is_older) && slot.in_flight_->passed()) return &slot;
  }
  return nullptr;
}

Ring::Slot& Ring::lease() {
  const auto at = std::ranges::find(free_, nullptr, &Slot::in_flight_);
  Slot& slot = **at;
  free_.erase(at);
  return slot;
}

}  // namespace pyint8
