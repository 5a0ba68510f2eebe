#include "transfer/ring.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace pyint8 {
namespace {

// Less than a slot takes on the bus.
constexpr std::chrono::microseconds kPollInterval{20};

}  // namespace

Ring::Ring(std::byte* memory, std::size_t slot_bytes, std::size_t slots) : slots_(slots) {
  for (Slot& slot : slots_) {
    slot.data_ = std::exchange(memory, memory + slot_bytes);
    free_.push_back(&slot);
  }
}

Event& Ring::Slot::event_on(Device& device, std::size_t lane) {
  if (events_.size() <= lane) events_.resize(lane + 1);
  if (events_[lane] == nullptr) events_[lane] = device.make_event();
  lane_ = lane;
  return *(in_flight_ = events_[lane].get());
}

// Any slot may be the first to be emptied, where they are on their way to several devices. Events are polled:
// one that a thread can sleep for interrupts the CPU when it passes, and holds up the copies behind it.
std::optional<std::size_t> Ring::wait_for_empty() {
  const auto is_empty = [](const Slot* slot) {
    return slot->in_flight_ == nullptr || slot->in_flight_->passed();
  };
  auto at = std::ranges::find_if(free_, is_empty);
  for (; at == free_.end(); at = std::ranges::find_if(free_, is_empty))
    std::this_thread::sleep_for(kPollInterval);
  Slot& slot = **at;
  if (std::exchange(slot.in_flight_, nullptr) == nullptr) return std::nullopt;
  return slot.lane_;
}

Ring::Slot& Ring::lease() {
  const auto at = std::ranges::find(free_, nullptr, &Slot::in_flight_);
  Slot& slot = **at;
  free_.erase(at);
  return slot;
}

}  // namespace pyint8
