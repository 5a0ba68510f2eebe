#include "transfer/timeline.hpp"

#include <chrono>
#include <utility>

namespace pyint8 {
namespace {

// More than are added at once, so that what is over does not gather.
constexpr int kTakenAtOnce = 2;

}  // namespace

double Timeline::now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Timeline::add(const Span& span) {
  const std::lock_guard lock(mutex_);
  spans_.push_back(span);
}

void Timeline::add_device(std::uint32_t lane, Device& device) {
  std::unique_ptr<Event> start = device.make_timed_event();
  if (start == nullptr) return;
  device.record(*start);
  device.synchronize();
  const double started = now();
  const std::lock_guard lock(mutex_);
  clocks_.emplace(lane, Clock{&device, std::move(start), started});
}

// A map never moves its elements.
const Timeline::Clock* Timeline::clock(std::uint32_t lane) const {
  const std::lock_guard lock(mutex_);
  const auto found = clocks_.find(lane);
  return found == clocks_.end() ? nullptr : &found->second;
}

std::unique_ptr<Event> Timeline::mark(std::uint32_t lane, StreamHandle stream) const {
  const Clock* timed = clock(lane);
  if (timed == nullptr) return nullptr;
  std::unique_ptr<Event> event = timed->device->make_timed_event();
  timed->device->record_on(stream, *event);
  return event;
}

std::unique_ptr<Event> Timeline::mark_copies(std::uint32_t lane) const {
  const Clock* timed = clock(lane);
  if (timed == nullptr) return nullptr;
  std::unique_ptr<Event> event = timed->device->make_timed_event();
  timed->device->record(*event);
  return event;
}

void Timeline::add_work(Doing doing, std::uint32_t lane, std::unique_ptr<Event> begin,
                        std::unique_ptr<Event> end, std::uint64_t nbytes) {
  if (begin == nullptr || end == nullptr) return;
  const std::lock_guard lock(mutex_);
  under_way_.push_back({doing, lane, std::move(begin), std::move(end), nbytes});
  for (int i = 0; i < kTakenAtOnce && !under_way_.empty() && under_way_.front().end->passed(); ++i) {
    take_times(under_way_.front());
    under_way_.pop_front();
  }
}

void Timeline::settle() {
  const std::lock_guard lock(mutex_);
  // If a mark's driver fails, none of them is asked for again.
  for (Work& work : std::exchange(under_way_, {})) {
    if (!work.end->passed()) {
      under_way_.push_back(std::move(work));
      continue;
    }
    take_times(work);
  }
}

void Timeline::take_times(const Work& work) {
  const Clock& timed = clocks_.at(work.lane);
  spans_.push_back({work.doing, work.lane, timed.started + work.begin->seconds_since(*timed.start),
                    timed.started + work.end->seconds_since(*timed.start), work.nbytes});
}

std::vector<Span> Timeline::spans() const {
  const std::lock_guard lock(mutex_);
  return spans_;
}

}  // namespace pyint8
