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
  // `first`: ahead of everything that waits for this lane, but for what was to be first before. If there is
  // no memory, none is taken.
  void push(std::size_t lane, std::vector<Job> jobs, bool first) {
    if (lanes_.size() <= lane) lanes_.resize(lane + 1);
    auto& waiting = first ? lanes_[lane].firsts : lanes_[lane].others;
    waiting.insert(waiting.end(), std::make_move_iterator(jobs.begin()), std::make_move_iterator(jobs.end()));
  }

  bool empty() const {
    return std::ranges::all_of(lanes_, [](const Lane& lane) { return lane.empty(); });
  }

  // Takes the next job: the first of the lane that has the fewest under way. There must be one.
  Job pop() {
    Lane& lane = idlest();
    auto& waiting = lane.firsts.empty() ? lane.others : lane.firsts;
    Job job = std::move(waiting.front());
    waiting.pop_front();
    ++lane.under_way;
    return job;
  }

  // A job of this lane has ended, on the device too, which is ready for another.
  void done(std::size_t lane) { --lanes_[lane].under_way; }

  void clear() {
    for (Lane& lane : lanes_) {
      lane.firsts.clear();
      lane.others.clear();
    }
  }

 private:
  struct Lane {
    bool empty() const { return firsts.empty() && others.empty(); }

    std::deque<Job> firsts, others;
    std::size_t under_way = 0;
  };

  Lane& idlest() {
    Lane* best = nullptr;
    for (Lane& lane : lanes_) {
      if (lane.empty()) continue;
      if (best == nullptr || lane.under_way < best->under_way) best = &lane;
    }
    return *best;
  }

  std::deque<Lane> lanes_;
};

}  // namespace pyint8
