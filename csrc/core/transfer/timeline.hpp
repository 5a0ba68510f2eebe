// What workers, buses and consumers did when, for a picture of a load.
//
// Times of a device come from events around its work, and are put on the host's clock by one that was waited
// for. Where several workers' copies alternate on one stream, each span lasts from a worker's first to its
// last.
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
  // Around what puts one copy on a lane's copy stream. Copies, which are short and many, share a span for as
  // long as one follows another, and a few of them at most.
  void begin_copy(std::uint32_t lane);
  void end_copy(std::uint32_t lane, std::uint64_t nbytes);
  // A mark in a stream of a lane's device, for `add_work`; null where nothing is timed.
  std::unique_ptr<Event> mark(std::uint32_t lane, StreamHandle stream) const;
  // Work between two marks; of no effect without them.
  void add_work(Doing doing, std::uint32_t lane, std::unique_ptr<Event> begin, std::unique_ptr<Event> end,
                std::uint64_t nbytes);
  // Takes the times of the work that is over. `add_work` does so for what is long over, so that little is
  // left.
  void settle();

  // All so far, in no order; of a device's work what is settled.
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

  struct Copies {
    std::unique_ptr<Event> begin, end;  // the latter moves behind each of them
    std::uint64_t nbytes = 0;
    int count = 0, under_way = 0;
  };

  const Clock* clock(std::uint32_t lane) const;
  // With the lock held:
  const Clock* locked_clock(std::uint32_t lane) const;
  void close_span(std::uint32_t lane, Copies& copies);
  void take_some();
  void take_times(const Work& work);

  mutable std::mutex mutex_;
  std::map<std::uint32_t, Clock> clocks_;
  std::map<std::uint32_t, Copies> copies_;
  std::deque<Work> under_way_;
  std::vector<Span> spans_;
};

}  // namespace pyint8
