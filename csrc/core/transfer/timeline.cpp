#include "transfer/timeline.hpp"

#include <algorithm>
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

double Timeline::time_of(const Clock& timed, Event& event) const {
  return timed.started + event.seconds_since(*timed.start);
}

void Timeline::add_copy(std::uint32_t lane, Event& ended, double issued, std::uint64_t nbytes) {
  const Clock* timed = clock(lane);
  if (timed == nullptr) return;
  const double end = time_of(*timed, ended);
  const std::lock_guard lock(mutex_);
  copies_[lane].push_back({issued, end, nbytes});
}

std::unique_ptr<Event> Timeline::mark(std::uint32_t lane, StreamHandle stream) {
  const Clock* timed = clock(lane);
  if (timed == nullptr) return nullptr;
  std::unique_ptr<Event> event;
  {
    const std::lock_guard lock(marks_mutex_);
    auto& spare = spare_[lane];
    if (!spare.empty()) {
      event = std::move(spare.back());
      spare.pop_back();
    }
  }
  if (event == nullptr) event = timed->device->make_timed_event();
  timed->device->record_on(stream, *event);
  return event;
}

void Timeline::add_work(Doing doing, std::uint32_t lane, std::unique_ptr<Event> begin,
                        std::unique_ptr<Event> end, std::uint64_t nbytes) {
  if (begin == nullptr || end == nullptr) return;
  const std::lock_guard lock(marks_mutex_);
  unsettled_.push_back({doing, lane, std::move(begin), std::move(end), nbytes});
  take_some();
}

void Timeline::take_some() {
  for (int i = 0; i < kTakenAtOnce && !unsettled_.empty() && unsettled_.front().end->passed(); ++i) {
    Work work = std::move(unsettled_.front());
    unsettled_.pop_front();  // first: should its times not be taken, it is in pieces
    take_times(work);
  }
}

void Timeline::settle() {
  const std::lock_guard lock(marks_mutex_);
  // If a mark's driver fails, none of them is asked for again.
  for (Work& work : std::exchange(unsettled_, {})) {
    if (!work.end->passed()) {
      unsettled_.push_back(std::move(work));
      continue;
    }
    take_times(work);
  }
}

void Timeline::take_times(Work& work) {
  const Clock& timed = *clock(work.lane);
  const double begin = time_of(timed, *work.begin), end = time_of(timed, *work.end);
  auto& spare = spare_[work.lane];
  spare.push_back(std::move(work.begin));
  spare.push_back(std::move(work.end));
  const std::lock_guard lock(mutex_);
  spans_.push_back({work.doing, work.lane, begin, end, work.nbytes});
}

std::vector<Span> Timeline::spans() const {
  std::vector<Span> found;
  std::map<std::uint32_t, std::vector<Copy>> copies;
  {
    const std::lock_guard lock(mutex_);
    found = spans_;
    copies = copies_;
  }
  for (auto& [lane, of_lane] : copies) {
    std::ranges::sort(of_lane, {}, &Copy::end);
    double free_since = 0;
    for (const Copy& copy : of_lane) {
      const double begin = std::min(std::max(copy.issued, free_since), copy.end);
      found.push_back({Doing::kCopying, lane, begin, copy.end, copy.nbytes});
      free_since = copy.end;
    }
  }
  return found;
}

}  // namespace pyint8
