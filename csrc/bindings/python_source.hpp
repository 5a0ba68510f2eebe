// Where bytes come from if Python fetches them, such as from an object store.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>

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

// Reads by `ranges(offset, nbytes)`, which gives buffers that follow one another, nbytes in all. They are
// copied without the lock. `cancel()` makes that raise soon.
class PythonSource final : public Source {
 public:
  // With the interpreter's lock held.
  PythonSource(pybind11::object ranges, pybind11::object cancel);
  // Takes the lock, as all that follow.
  ~PythonSource() override;
  PythonSource(const PythonSource&) = delete;
  PythonSource& operator=(const PythonSource&) = delete;

  void read_at(std::byte* out, std::size_t needed, std::size_t capacity, std::uint64_t offset) const override;
  // Every range says itself if it is of another state than the first.
  void require_unchanged() const override {}
  void cancel() const noexcept override;

 private:
  pybind11::object ranges_;
  pybind11::object cancel_;
};

}  // namespace pyint8
