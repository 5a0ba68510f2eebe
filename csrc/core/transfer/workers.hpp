// Threads that take jobs from a queue. They are joined, never detached, and never throw: the first error is
// kept and stops the rest.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pyint8 {

template <typename Job>
class Workers {
 public:
  // `run` is called on the threads, one job at a time each; `on_failure` once, after the first error is kept.
  Workers(std::size_t threads, std::function<void(const Job&)> run, std::function<void()> on_failure)
      : run_(std::move(run)), on_failure_(std::move(on_failure)) {
    try {
      for (std::size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { loop(); });
    } catch (...) {  // no more threads to be had: join those there are
      stop();
      throw;
    }
  }
  ~Workers() { stop(); }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // `first`: ahead of everything that waits. Discarded once stopped.
  void push(std::vector<Job> jobs, bool first) {
    {
      const std::lock_guard lock(mutex_);
      if (stopped_) return;
      const auto at = first ? jobs_.begin() : jobs_.end();
      jobs_.insert(at, std::make_move_iterator(jobs.begin()), std::make_move_iterator(jobs.end()));
    }
    wake_.notify_all();
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
  void loop() {
    for (;;) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return stopped_ || !jobs_.empty(); });
      if (stopped_) return;
      const Job job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      try {
        run_(job);
      } catch (...) {
        fail(std::current_exception());
      }
    }
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
    on_failure_();
  }

  std::function<void(const Job&)> run_;
  std::function<void()> on_failure_;
  mutable std::mutex mutex_;  // guards the three below
  std::deque<Job> jobs_;
  std::exception_ptr error_;
  bool stopped_ = false;
  std::condition_variable wake_;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace pyint8
