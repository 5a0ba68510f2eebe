// A worker's own slots of host memory: leased to be filled, and given back to be emptied by the bus.
//
// A worker fills no slot but its own, so that the lines it writes are in its core's cache already; small
// enough for the last-level cache, all rings together let the bus read them there too
// (docs/performance.md, "Slots"). Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
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
  // `memory` holds the slots one behind the other, and outlives this. Events are timed, where a device can,
  // if they are asked for their times.
  Ring(std::byte* memory, std::size_t slot_bytes, std::size_t slots, bool timed = false);

  // The copies out of a slot.
  struct Copied {
    std::size_t lane = 0;
    std::size_t road = 0;
    Event* end = nullptr;
    double issued = 0;  // seconds of the caller's clock
    std::uint64_t nbytes = 0;
  };

  class Slot {
   public:
    std::byte* data() const { return data_; }
    // Marks the end of the copies out of this slot, all issued on `road`, a lane's with this number; the rest
    // is what the caller wants to know of them when they have ended. Where the driver fails, nothing is
    // marked.
    void mark(Road& road, std::size_t lane, std::size_t number = 0, double issued = 0,
              std::uint64_t nbytes = 0);

   private:
    friend class Ring;
    Event& event_on(Road& road, std::size_t way);
    std::byte* data_ = nullptr;
    bool timed_ = false;
    Event* in_flight_ = nullptr;                  // of the last copies, until they are known to have ended
    Copied copied_;                               // those copies
    std::vector<std::unique_ptr<Event>> events_;  // by lane and road
  };

  // Waits until the bus has emptied one of the slots that were given back. The lane whose copies emptied it,
  // if it was not empty before.
  std::optional<std::size_t> wait_for_empty();
  // The copies whose end `wait_for_empty` saw, until the next slot is leased.
  const Copied& emptied() const { return emptied_; }
  // The copies that may be under way.
  std::vector<Copied> under_way() const;
  // Of the slots that are empty, the one that was given back longest ago. There must be one.
  Slot& lease();
  // Gives a slot back while its copies, marked by `mark`, may still be under way.
  void give_back(Slot& slot) { free_.push_back(&slot); }

 private:
  Slot* find_empty();

  std::deque<Slot> slots_;
  Copied emptied_;
  std::deque<Slot*> free_;  // in the order they were given back
};

}  // namespace pyint8
