// Threads that take jobs from a queue. They are joined, never detached, and never throw: the first error is
// kept and stops the rest.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "error.hpp"
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

  // Fewer threads than asked for do where the operating system refuses more; throws kIo if there is none.
  Workers(std::size_t threads, Role role) : role_(std::move(role)) {
    threads_.reserve(threads);
    try {
      for (std::size_t i = 0; i < threads && start(i); ++i) continue;
    } catch (...) {  // no memory for another: those that run must be joined
      stop();
      throw;
    }
  }
  ~Workers() { stop(); }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // `first`: ahead of all that waits for the lane. Discarded once stopped. All of them or, if it throws,
  // none.
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

  // Whether jobs under way should end early: nobody waits for what they bring.
  bool is_stopped() const { return stopped_; }

  std::size_t size() const { return threads_.size(); }

  // The first error of a job, or null.
  std::exception_ptr error() const {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  // False if the operating system refuses another thread.
  bool start(std::size_t worker) {
    try {
      threads_.emplace_back([this, worker] { loop(worker); });
    } catch (const std::system_error& error) {
      if (threads_.empty()) throw refused_thread(error);
      return false;
    }
    return true;
  }

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
  mutable std::mutex mutex_;  // guards the three below, but for reading the last
  LaneQueue<Job> jobs_;
  std::exception_ptr error_;
  std::atomic<bool> stopped_ = false;  // written with the lock held
  std::condition_variable wake_;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace pyint8
