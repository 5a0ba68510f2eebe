#include "transfer/ring.hpp"

namespace pyint8 {

Ring::Ring(std::unique_ptr<HostMemory> memory, std::size_t slot_bytes, std::size_t slots)
    : memory_(std::move(memory)), slots_(slots) {
  for (std::size_t i = 0; i < slots; ++i) {
    slots_[i].data_ = memory_->data() + i * slot_bytes;
    free_.push_back(&slots_[i]);
  }
}

Event& Ring::Slot::event_on(Device& device) {
  for (auto& [owner, event] : events_) {
    if (owner == &device) return *(in_flight_ = event.get());
  }
  events_.emplace_back(&device, device.make_event());
  return *(in_flight_ = events_.back().second.get());
}

Ring::Slot& Ring::lease() {
  std::unique_lock lock(mutex_);
  returned_.wait(lock, [this] { return !free_.empty(); });
  Slot& slot = *free_.front();
  free_.pop_front();
  lock.unlock();
  if (slot.in_flight_ != nullptr) slot.in_flight_->wait();
  slot.in_flight_ = nullptr;
  return slot;
}

void Ring::give_back(Slot& slot) {
  {
    const std::lock_guard lock(mutex_);
    free_.push_back(&slot);
  }
  returned_.notify_one();
}

}  // namespace pyint8
