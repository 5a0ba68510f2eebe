#include "transfer/timeline.hpp"

#include <chrono>
#include <utility>

namespace pyint8 {
namespace {

// More than are added at once, so that what is over does not gather.
constexpr int kTakenAtOnce = 2;
// Half a millisecond of a bus. A mark costs microseconds of a driver that all workers share: with two for
// each copy, a load took half as long again (docs/performance.md, "Timelines").
constexpr int kCopiesOfASpan = 16;

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

const Timeline::Clock* Timeline::clock(std::uint32_t lane) const {
  const std::lock_guard lock(mutex_);
  return locked_clock(lane);
}

// A map never moves its elements.
const Timeline::Clock* Timeline::locked_clock(std::uint32_t lane) const {
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

void Timeline::begin_copy(std::uint32_t lane) {
  const std::lock_guard lock(mutex_);
  const Clock* timed = locked_clock(lane);
  if (timed == nullptr) return;
  Copies& copies = copies_[lane];
  const bool is_idle = copies.begin != nullptr && copies.under_way == 0 && copies.end->passed();
  if (is_idle) close_span(lane, copies);
  if (copies.begin == nullptr) {
    std::unique_ptr<Event> begin = timed->device->make_timed_event();
    copies.end = timed->device->make_timed_event();
    timed->device->record(*begin);
    copies.begin = std::move(begin);
  }
  ++copies.under_way;
}

void Timeline::end_copy(std::uint32_t lane, std::uint64_t nbytes) {
  const std::lock_guard lock(mutex_);
  const Clock* timed = locked_clock(lane);
  Copies& copies = copies_[lane];
  if (timed == nullptr || copies.begin == nullptr) return;  // there was no clock when it began
  --copies.under_way;
  copies.nbytes += nbytes;
  ++copies.count;
  timed->device->record(*copies.end);
  if (copies.count >= kCopiesOfASpan && copies.under_way == 0) close_span(lane, copies);
  take_some();
}

void Timeline::close_span(std::uint32_t lane, Copies& copies) {
  Copies closed = std::exchange(copies, {});
  under_way_.push_back(
      {Doing::kCopying, lane, std::move(closed.begin), std::move(closed.end), closed.nbytes});
}

void Timeline::add_work(Doing doing, std::uint32_t lane, std::unique_ptr<Event> begin,
                        std::unique_ptr<Event> end, std::uint64_t nbytes) {
  if (begin == nullptr || end == nullptr) return;
  const std::lock_guard lock(mutex_);
  under_way_.push_back({doing, lane, std::move(begin), std::move(end), nbytes});
  take_some();
}

void Timeline::take_some() {
  for (int i = 0; i < kTakenAtOnce && !under_way_.empty() && under_way_.front().end->passed(); ++i) {
    take_times(under_way_.front());
    under_way_.pop_front();
  }
}

void Timeline::settle() {
  const std::lock_guard lock(mutex_);
  for (auto& [lane, copies] : copies_) {
    if (copies.count > 0 && copies.under_way == 0) close_span(lane, copies);
  }
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
