// A fixed number of equal slots of host memory, leased to be filled and given back to be emptied by the bus.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device/device.hpp"

namespace pyint8 {

// Small enough for the last-level cache, a ring lets a byte be copied out of the page cache and read by the
// bus without a trip to memory.
class Ring {
 public:
  Ring(std::unique_ptr<HostMemory> memory, std::size_t slot_bytes, std::size_t slots);

  class Slot {
   public:
    std::byte* data() const { return data_; }
    // The event to record once the copies out of this slot are issued on `device`.
    Event& event_on(Device& device);

   private:
    friend class Ring;
    std::byte* data_ = nullptr;
    Event* in_flight_ = nullptr;  // the event of the last copies, if any
    std::vector<std::pair<Device*, std::unique_ptr<Event>>> events_;
  };

  // The slot that was given back longest ago, once the bus has emptied it. Blocks while there is none.
  Slot& lease();
  // Gives a slot back while its copies, marked by `event_on`, may still be under way.
  void give_back(Slot& slot);

 private:
  std::unique_ptr<HostMemory> memory_;
  std::vector<Slot> slots_;
  std::mutex mutex_;  // guards free_
  std::condition_variable returned_;
  std::deque<Slot*> free_;
};

}  // namespace pyint8
