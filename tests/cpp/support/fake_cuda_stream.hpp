// Streams and events that are as asynchronous as a GPU's: each stream is a queue with a thread of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

namespace fake_cuda {

// One record of an event. Recording the event again makes another moment, so whoever waits for this one still
// waits for this one.
class Moment {
 public:
  void pass() {
    const std::lock_guard lock(mutex_);
    passed_ = true;
    when_ = std::chrono::steady_clock::now();
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return passed_; });
  }
  bool has_passed() const {
    const std::lock_guard lock(mutex_);
    return passed_;
  }
  std::chrono::steady_clock::time_point when() const {
    const std::lock_guard lock(mutex_);
    return when_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool passed_ = false;
  std::chrono::steady_clock::time_point when_;
};

class Stream {
 public:
  Stream(const void* context, std::uint32_t number, unsigned max_delay_us)
      : context_(context), number_(number), random_(number), max_delay_us_(max_delay_us), thread_([this] {
          loop();
        }) {}
  // Runs empty first.
  ~Stream() {
    close();
    thread_.join();
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const void* context() const { return context_; }
  std::uint32_t number() const { return number_; }

  void push(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    ++pending_;
    changed_.notify_all();
  }
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return pending_ == 0; });
  }
  // Lets the thread end once the queue is empty, without waiting for it.
  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

 private:
  void loop() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !work_.empty(); });
      if (work_.empty()) return;
      const std::function<void()> work = std::move(work_.front());
      work_.pop_front();
      lock.unlock();
      dawdle();
      work();
      lock.lock();
      --pending_;
      changed_.notify_all();
    }
  }

  // Late enough, often enough, that memory reused too early has changed when it is read. A sleep would do,
  // but lasts a millisecond on some machines.
  void dawdle() {
    if (max_delay_us_ == 0 || random_() % 4 != 0) return;
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(random_() % max_delay_us_);
    while (std::chrono::steady_clock::now() < end) std::this_thread::yield();
  }

  const void* context_;
  const std::uint32_t number_;
  std::minstd_rand random_;
  const unsigned max_delay_us_;
  std::mutex mutex_;  // guards the four below
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  std::size_t pending_ = 0;
  bool closed_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace fake_cuda
