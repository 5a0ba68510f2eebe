// What comes before what: finds operations of different streams that touch the same memory in no order, which
// is a race on a GPU. Judged when an operation is put on its stream, so that no delay is needed to see it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace fake_cuda {

// For each stream, by its number: how many of its operations come before.
using Clock = std::map<std::uint32_t, std::uint64_t>;

struct Access {
  std::uint64_t begin;
  std::uint64_t nbytes;
  bool writes;
};

class Order {
 public:
  // Puts an operation on a stream: what it touches, and how many of these accesses race with earlier ones.
  std::int64_t put(std::uint32_t stream, const std::vector<Access>& accesses) {
    Clock& now = streams_[stream];
    join(now, host_);
    const std::uint64_t time = ++now[stream];
    const auto races =
        std::ranges::count_if(accesses, [&](const Access& a) { return races_with_log(a, now); });
    for (const Access& access : accesses) {
      std::erase_if(log_, [&](const Entry& entry) { return is_replaced(entry, access, now); });
      log_.push_back({access, stream, time});
    }
    return races;
  }

  // All that was put on a stream so far.
  const Clock& of(std::uint32_t stream) { return streams_[stream]; }
  // What is put on a stream from now on comes after this.
  void wait(std::uint32_t stream, const Clock& moment) { join(streams_[stream], moment); }
  // The host knows that this is over: whatever it puts on any stream from now on comes after.
  void host_saw(const Clock& moment) {
    join(host_, moment);
    std::erase_if(log_, [&](const Entry& entry) { return comes_before(entry, host_); });
  }
  void forget(std::uint32_t stream) { streams_.erase(stream); }
  void clear() {
    log_.clear();
    host_.clear();
  }

 private:
  struct Entry {
    Access access;
    std::uint32_t stream;
    std::uint64_t time;
  };

  static void join(Clock& clock, const Clock& other) {
    for (const auto& [stream, time] : other) clock[stream] = std::max(clock[stream], time);
  }
  static bool comes_before(const Entry& entry, const Clock& clock) {
    const auto found = clock.find(entry.stream);
    return found != clock.end() && entry.time <= found->second;
  }
  bool races_with_log(const Access& access, const Clock& now) const {
    return std::ranges::any_of(log_, [&](const Entry& entry) {
      const Access& other = entry.access;
      const bool overlaps =
          access.begin < other.begin + other.nbytes && other.begin < access.begin + access.nbytes;
      return overlaps && (access.writes || other.writes) && !comes_before(entry, now);
    });
  }
  // Whoever comes after the later access comes after the earlier one too.
  static bool is_replaced(const Entry& entry, const Access& by, const Clock& now) {
    const Access& other = entry.access;
    const bool covers = by.begin <= other.begin && other.begin + other.nbytes <= by.begin + by.nbytes;
    return covers && (by.writes || !other.writes) && comes_before(entry, now);
  }

  std::map<std::uint32_t, Clock> streams_;
  Clock host_;
  std::vector<Entry> log_;
};

}  // namespace fake_cuda
