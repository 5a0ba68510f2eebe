#include "python_source.hpp"

#include <cstring>
#include <string>
#include <utility>

#include "error.hpp"

namespace py = pybind11;

namespace pyint8 {
namespace {

// Once Python ends, nobody can take its lock any more; what is left then goes with the process.
void let_go(PyObject* object) {
  if (Py_IsInitialized() == 0) return;
  const py::gil_scoped_acquire held;
  Py_DECREF(object);
}

// The bytes of a Python object, in one piece.
class Buffer {
 public:
  explicit Buffer(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::size_t size() const { return static_cast<std::size_t>(view_.len); }
  const std::byte* data() const { return static_cast<const std::byte*>(view_.buf); }

 private:
  Py_buffer view_{};
};

Error miscounted(std::size_t needed, const std::string& got) {
  return Error(ErrorCode::kInvalidArgument,
               "a source that was asked for " + std::to_string(needed) + " bytes gave " + got);
}

}  // namespace

PythonFailure::PythonFailure(const py::error_already_set& error)
    : raised_(py::object(error.value()).release().ptr(), let_go) {}

// A copy: what is raised gets a traceback, and with it the frames of whoever waited, who hold the engine,
// which holds this. Nothing would ever let go of them.
void PythonFailure::restore() const {
  PyObject* const raised = raised_.get();
  py::object error = py::reinterpret_borrow<py::object>(raised);
  try {
    const py::object copied = py::module_::import("copy").attr("copy")(error);
    PyException_SetCause(copied.ptr(), PyException_GetCause(raised));
    const auto traceback = py::reinterpret_steal<py::object>(PyException_GetTraceback(raised));
    if (traceback) PyException_SetTraceback(copied.ptr(), traceback.ptr());
    error = copied;
  } catch (const py::error_already_set&) {  // it is of a kind that cannot be copied
  }
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

void Fetch::fill(const py::object& ranges, std::uint64_t offset) noexcept {
  std::exception_ptr error;
  try {
    take(ranges, offset);
  } catch (...) {
    error = std::current_exception();
  }
  const py::gil_scoped_release released;
  end(std::move(error));
}

// In a function of its own: what is thrown while a failure is written down, for lack of memory, is its error.
void Fetch::take(const py::object& ranges, std::uint64_t offset) {
  try {
    const py::object chunks = ranges(offset, needed_);
    for (const py::handle chunk : chunks) {
      const Buffer buffer(chunk);
      const py::gil_scoped_release released;
      if (!add(buffer.data(), buffer.size())) break;
    }
  } catch (const py::error_already_set& raised) {
    throw PythonFailure(raised);
  }
}

// With the lock held for the length of a copy, so that whoever leaves may give the memory back.
bool Fetch::add(const std::byte* data, std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  if (is_left_) return false;
  if (nbytes > needed_ - got_) throw miscounted(needed_, "more");
  std::memcpy(out_ + got_, data, nbytes);
  got_ += nbytes;
  return true;
}

void Fetch::end(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    has_ended_ = true;
  }
  ended_.notify_all();
}

void Fetch::await() {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return has_ended_ || is_left_; });
  if (is_left_) throw Error(ErrorCode::kCancelled, "the stream was closed");
  if (error_ != nullptr) std::rethrow_exception(error_);
  if (got_ < needed_) throw miscounted(needed_, std::to_string(got_));
}

void Fetch::leave() {
  {
    const std::lock_guard lock(mutex_);
    is_left_ = true;
  }
  ended_.notify_all();
}

PythonSource::PythonSource(py::object ranges, py::object cancel, py::object run)
    : ranges_(std::move(ranges)), cancel_(std::move(cancel)), run_(std::move(run)) {}

PythonSource::~PythonSource() {
  let_go(ranges_.release().ptr());
  let_go(cancel_.release().ptr());
  let_go(run_.release().ptr());
}

void PythonSource::read_at(std::byte* out, std::size_t needed, std::size_t /*capacity*/,
                           std::uint64_t offset) const {
  const auto fetch = std::make_shared<Fetch>(out, needed);
  {
    const std::lock_guard lock(mutex_);
    if (is_cancelled_) throw Error(ErrorCode::kCancelled, "the stream was closed");
    fetches_.insert(fetch);
  }
  struct Removal {  // whatever happens, before `out` goes
    const PythonSource& source;
    const std::shared_ptr<Fetch>& fetch;
    ~Removal() {
      fetch->leave();
      const std::lock_guard lock(source.mutex_);
      source.fetches_.erase(fetch);
    }
  } const removal{*this, fetch};
  {
    const py::gil_scoped_acquire held;
    try {
      if (run_.is_none()) {
        fetch->fill(ranges_, offset);
      } else {
        run_(py::cpp_function([fetch, ranges = ranges_, offset] { fetch->fill(ranges, offset); }));
      }
    } catch (const py::error_already_set& error) {
      throw PythonFailure(error);
    }
  }
  fetch->await();
}

void PythonSource::cancel() const noexcept {
  {
    const std::lock_guard lock(mutex_);
    is_cancelled_ = true;
    for (const auto& fetch : fetches_) fetch->leave();
  }
  const py::gil_scoped_acquire held;
  try {
    call_cancel();
  } catch (...) {  // no memory to say even that: those who wait have left in any case
  }
}

// A Ctrl-C that comes in the middle is raised there, where it would get lost, and readers would go on.
void PythonSource::call_cancel() const {
  bool was_interrupted = false;
  for (bool again = true; std::exchange(again, false);) {
    try {
      cancel_();
    } catch (py::error_already_set& error) {
      again = !was_interrupted && error.matches(PyExc_KeyboardInterrupt);
      was_interrupted |= again;
      if (!again) error.discard_as_unraisable("the cancelling of a read");
    }
  }
  if (was_interrupted) PyErr_SetInterrupt();
}

}  // namespace pyint8
