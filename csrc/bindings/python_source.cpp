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
  void copy_to(std::byte* out) const {
    const py::gil_scoped_release released;
    std::memcpy(out, view_.buf, size());
  }

 private:
  Py_buffer view_{};
};

Error miscounted(std::size_t needed, const std::string& got) {
  return Error(ErrorCode::kInvalidArgument,
               "a source that was asked for " + std::to_string(needed) + " bytes gave " + got);
}

void read(const py::object& ranges, std::byte* out, std::size_t needed, std::uint64_t offset) {
  std::size_t got = 0;
  const py::object chunks = ranges(offset, needed);
  for (const py::handle chunk : chunks) {
    const Buffer buffer(chunk);
    if (buffer.size() > needed - got) throw miscounted(needed, "more");
    buffer.copy_to(out + got);
    got += buffer.size();
  }
  if (got < needed) throw miscounted(needed, std::to_string(got));
}

}  // namespace

PythonFailure::PythonFailure(const py::error_already_set& error)
    : raised_(py::object(error.value()).release().ptr(), let_go) {}

void PythonFailure::restore() const {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised_.get())), raised_.get());
}

PythonSource::PythonSource(py::object ranges, py::object cancel)
    : ranges_(std::move(ranges)), cancel_(std::move(cancel)) {}

PythonSource::~PythonSource() {
  let_go(ranges_.release().ptr());
  let_go(cancel_.release().ptr());
}

void PythonSource::read_at(std::byte* out, std::size_t needed, std::size_t /*capacity*/,
                           std::uint64_t offset) const {
  const py::gil_scoped_acquire held;
  try {
    read(ranges_, out, needed, offset);
  } catch (const py::error_already_set& error) {
    throw PythonFailure(error);
  }
}

void PythonSource::cancel() const noexcept {
  const py::gil_scoped_acquire held;
  try {
    cancel_();
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("the cancelling of a read");
  }
}

}  // namespace pyint8
