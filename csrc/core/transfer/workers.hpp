// Threads that take jobs from a queue. They are joined, never detached, and never throw: the first error is
// kept and stops the rest.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "transfer/lane_queue.hpp"

namespace pyint8 {

template <typename Job>
class Workers {
 public:
  // What a worker, numbered from 0, does; all but `on_failure` are called on its thread.
  struct Role {
    // Returns once the worker can run a job at once; until then the others take the jobs.
    std::function<void(std::size_t worker)> get_ready;
    std::function<void(const Job&, std::size_t worker)> run;
    std::function<void()> on_failure;  // called once, after the first error is kept
  };

  Workers(std::size_t threads, Role role) : role_(std::move(role)) {
    try {
      for (std::size_t i = 0; i < threads; ++i) threads_.emplace_back([this, i] { loop(i); });
    } catch (...) {  // no more threads can be started: join the others
      stop();
      throw;
    }
  }
  ~Workers() { stop(); }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // `first`: ahead of everything that waits. Discarded once stopped.
  void push(std::size_t lane, std::vector<Job> jobs, bool first) {
    {
      const std::lock_guard lock(mutex_);
      if (stopped_) return;
      jobs_.push(lane, std::move(jobs), first);
    }
    wake_.notify_all();
  }

  // The device of this lane has finished one of its jobs.
  void done(std::size_t lane) {
    const std::lock_guard lock(mutex_);
    jobs_.done(lane);
  }

  // Lets the jobs under way end, discards the others, joins. Idempotent.
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_all();
    const std::lock_guard joining(join_mutex_);  // another thread may be stopping too
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
    jobs_.clear();
  }

  // The first error of a job, or null.
  std::exception_ptr error() const {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  void loop(std::size_t worker) {
    while (wait_for_jobs()) {
      try {
        role_.get_ready(worker);
        if (const std::optional<Job> job = take()) role_.run(*job, worker);
      } catch (...) {
        fail(std::current_exception());
      }
    }
  }

  // False once stopped.
  bool wait_for_jobs() {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return stopped_ || !jobs_.empty(); });
    return !stopped_;
  }

  // Empty if other workers took the jobs.
  std::optional<Job> take() {
    const std::lock_guard lock(mutex_);
    if (stopped_ || jobs_.empty()) return std::nullopt;
    return jobs_.pop();
  }

  void fail(std::exception_ptr error) {
    {
      const std::lock_guard lock(mutex_);
      if (error_ != nullptr) return;
      error_ = std::move(error);
      stopped_ = true;
      jobs_.clear();
    }
    wake_.notify_all();
    role_.on_failure();
  }

  Role role_;
  mutable std::mutex mutex_;  // guards the three below
  LaneQueue<Job> jobs_;
  std::exception_ptr error_;
  bool stopped_ = false;
  std::condition_variable wake_;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace pyint8
