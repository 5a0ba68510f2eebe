// A worker's own slots of host memory: leased to be filled, and given back to be emptied by the bus.
//
// A worker fills no slot but its own, so that the lines it writes are in its core's cache already; small
// enough for the last-level cache, all rings together let the bus read them there too
// (docs/performance.md, "Slots"). Not thread-safe.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "device/device.hpp"

namespace pyint8 {

// Ways to a lane's memory: its device's own bus, number 0, and detours.
inline constexpr std::size_t kMostRoads = 8;

class Ring {
 public:
  // `memory` holds the slots one behind the other, and outlives this.
  Ring(std::byte* memory, std::size_t slot_bytes, std::size_t slots);

  class Slot {
   public:
    std::byte* data() const { return data_; }
    // The event to record once the copies out of this slot are issued on `road`, a lane's with this number.
    Event& event_on(Road& road, std::size_t lane, std::size_t number = 0);

   private:
    friend class Ring;
    std::byte* data_ = nullptr;
    Event* in_flight_ = nullptr;                  // of the last copies, until they are known to have ended
    std::size_t way_ = 0;                         // of those copies: lane and road in one number
    std::vector<std::unique_ptr<Event>> events_;  // by that number
  };

  // Waits until the bus has emptied one of the slots that were given back. The lane whose copies emptied it,
  // if it was not empty before.
  std::optional<std::size_t> wait_for_empty();
  // Of the slots that are empty, the one that was given back longest ago. There must be one.
  Slot& lease();
  // Gives a slot back while its copies, marked by `event_on`, may still be under way.
  void give_back(Slot& slot) { free_.push_back(&slot); }

 private:
  Slot* find_empty();

  std::deque<Slot> slots_;
  std::deque<Slot*> free_;  // in the order they were given back
};

}  // namespace pyint8
