// Jobs that wait, by lane: each lane gets its share of the workers, however the jobs were submitted.
//
// In one queue for all, a lane's jobs come in bursts as large as its consumer's window, and while one
// device's bus is busy with its burst the others' are idle (docs/performance.md, "Lanes"). Not thread-safe:
// Workers guards it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <iterator>
#include <utility>
#include <vector>

namespace pyint8 {

template <typename Job>
class LaneQueue {
 public:
  // `first`: ahead of everything that waits, whatever its lane. If there is no memory, none is taken.
  void push(std::size_t lane, std::vector<Job> jobs, bool first) {
    if (lanes_.size() <= lane) lanes_.resize(lane + 1);
    if (first) {
      std::vector<std::pair<std::size_t, Job>> urgent;
      urgent.reserve(jobs.size());
      for (Job& job : jobs) urgent.emplace_back(lane, std::move(job));
      urgent_.insert(urgent_.begin(), std::make_move_iterator(urgent.begin()),
                     std::make_move_iterator(urgent.end()));
    } else {
      auto& waiting = lanes_[lane].waiting;
      waiting.insert(waiting.end(), std::make_move_iterator(jobs.begin()),
                     std::make_move_iterator(jobs.end()));
    }
  }

  bool empty() const {
    return urgent_.empty() &&
           std::ranges::all_of(lanes_, [](const Lane& lane) { return lane.waiting.empty(); });
  }

  // Takes the next job: an urgent one, or else the first of the lane that has the fewest under way. There
  // must be one.
  Job pop() { return urgent_.empty() ? take_from(idlest()) : take_urgent(); }

  // A job of this lane has ended, on the device too, which is ready for another.
  void done(std::size_t lane) { --lanes_[lane].under_way; }

  void clear() {
    urgent_.clear();
    for (Lane& lane : lanes_) lane.waiting.clear();
  }

 private:
  struct Lane {
    std::deque<Job> waiting;
    std::size_t under_way = 0;
  };

  Lane& idlest() {
    Lane* best = nullptr;
    for (Lane& lane : lanes_) {
      if (lane.waiting.empty()) continue;
      if (best == nullptr || lane.under_way < best->under_way) best = &lane;
    }
    return *best;
  }
  static Job take_from(Lane& lane) {
    Job job = std::move(lane.waiting.front());
    lane.waiting.pop_front();
    ++lane.under_way;
    return job;
  }
  Job take_urgent() {
    auto [lane, job] = std::move(urgent_.front());
    urgent_.pop_front();
    ++lanes_[lane].under_way;
    return std::move(job);
  }

  std::deque<std::pair<std::size_t, Job>> urgent_;
  std::deque<Lane> lanes_;
};

}  // namespace pyint8
