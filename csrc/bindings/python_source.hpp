// Where bytes come from if Python fetches them, such as from an object store.
#pragma once

#include <pybind11/pybind11.h>

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <set>

#include "storage/source.hpp"

namespace pyint8 {

// What a Python function raised, on its way through native code to whoever waits for its bytes. May be thrown
// and let go of on any thread.
class PythonFailure : public std::exception {
 public:
  // With the interpreter's lock held.
  explicit PythonFailure(const pybind11::error_already_set& error);
  // Raises it again, with the lock held; more than once if need be.
  void restore() const;

 private:
  std::shared_ptr<PyObject> raised_;
};

// One read on its way, most often by another thread than that of who waits for it, who may leave it.
class Fetch {
 public:
  Fetch(std::byte* out, std::size_t needed) : out_(out), needed_(needed) {}

  // With the interpreter's lock held: copies what `ranges` gives, without it, until that is all, or this was
  // left. Throws nothing.
  void fill(const pybind11::object& ranges, std::uint64_t offset) noexcept;
  // Without that lock: waits for it. Throws what `ranges` raised, or kCancelled if this was left.
  void await();
  // From now on nothing is written.
  void leave();

 private:
  void take(const pybind11::object& ranges, std::uint64_t offset);
  // False if this was left.
  bool add(const std::byte* data, std::size_t nbytes);
  void end(std::exception_ptr error);

  std::mutex mutex_;  // guards what follows
  std::condition_variable ended_;
  std::byte* const out_;
  const std::size_t needed_;
  std::size_t got_ = 0;
  bool has_ended_ = false;
  bool is_left_ = false;
  std::exception_ptr error_;
};

// Reads by `ranges(offset, nbytes)`, which gives buffers that follow one another, nbytes in all. They are
// copied without the lock. `cancel()` makes that raise soon. `run(task)` calls a task on another thread; None
// for who reads.
class PythonSource final : public Source {
 public:
  // With the interpreter's lock held.
  PythonSource(pybind11::object ranges, pybind11::object cancel, pybind11::object run);
  // Takes the lock, as all that follow.
  ~PythonSource() override;
  PythonSource(const PythonSource&) = delete;
  PythonSource& operator=(const PythonSource&) = delete;

  void read_at(std::byte* out, std::size_t needed, std::size_t capacity, std::uint64_t offset) const override;
  // Every range says itself if it is of another state than the first.
  void require_unchanged() const override {}
  // Reads by other threads are left.
  void cancel() const noexcept override;

 private:
  void call_cancel() const;

  pybind11::object ranges_;
  pybind11::object cancel_;
  pybind11::object run_;
  // Guards the two below; nobody asks for the interpreter's lock while he has it.
  mutable std::mutex mutex_;
  mutable std::set<std::shared_ptr<Fetch>> fetches_;
  mutable bool is_cancelled_ = false;
};

}  // namespace pyint8
