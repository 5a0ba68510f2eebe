// What workers, buses and consumers did when, for a picture of a load.
//
// Times of a device come from events, and are put on the host's clock by one that was waited for. Copies have
// an event each anyway, which says when their slot is free; it is timed, and asked by the worker that finds
// it passed. They follow one another on one stream: so each began when it was issued, or when the one before
// it ended. Nothing of that asks the driver with a lock held that workers need (docs/performance.md,
// "Timelines").
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "device/device.hpp"

namespace pyint8 {

enum class Doing : std::uint8_t { kWaiting, kReading, kCopying, kQuantizing };

struct Span {
  Doing doing;
  std::uint32_t who;  // the worker, or the lane for what a device does
  double begin, end;  // seconds of the steady clock
  std::uint64_t nbytes;
};

// Thread-safe.
class Timeline {
 public:
  // Seconds of the steady clock.
  static double now();

  void add(const Span& span);
  // Waits for the copies of a lane's device; from now on its work can be timed, if it can at all.
  void add_device(std::uint32_t lane, Device& device);
  // A copy that has ended, with a timed event behind it; `issued` on the host's clock.
  void add_copy(std::uint32_t lane, Event& ended, double issued, std::uint64_t nbytes);
  // A mark in a stream of a lane's device, for `add_work`; null where nothing is timed.
  std::unique_ptr<Event> mark(std::uint32_t lane, StreamHandle stream);
  // Work between two marks; of no effect without them.
  void add_work(Doing doing, std::uint32_t lane, std::unique_ptr<Event> begin, std::unique_ptr<Event> end,
                std::uint64_t nbytes);
  // Takes the times of the work that is over. `add_work` does so for what is long over, so that little is
  // left.
  void settle();

  // All so far, in no order; of a device's work what is settled. Sorts, so it is for later.
  std::vector<Span> spans() const;

 private:
  struct Clock {
    Device* device;
    std::unique_ptr<Event> start;
    double started;
  };
  struct Work {
    Doing doing;
    std::uint32_t lane;
    std::unique_ptr<Event> begin, end;
    std::uint64_t nbytes;
  };

  struct Copy {
    double issued, end;
    std::uint64_t nbytes;
  };

  const Clock* clock(std::uint32_t lane) const;
  double time_of(const Clock& timed, Event& event) const;
  // With the lock of marks held:
  void take_some();
  void take_times(Work& work);

  // Held for a moment, by all workers.
  mutable std::mutex mutex_;
  std::map<std::uint32_t, Clock> clocks_;
  std::map<std::uint32_t, std::vector<Copy>> copies_;
  std::vector<Span> spans_;
  // Held while the driver is asked, by consumers; taken before the other.
  std::mutex marks_mutex_;
  std::deque<Work> unsettled_;
  std::map<std::uint32_t, std::vector<std::unique_ptr<Event>>> spare_;  // by lane, to be recorded again
};

}  // namespace pyint8
