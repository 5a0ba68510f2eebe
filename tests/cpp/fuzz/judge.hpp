// What an engine or a consumer may answer when this and that goes wrong with it.
#pragma once

#include <cerrno>
#include <functional>
#include <optional>
#include <set>

#include "cuda_support.hpp"
#include "error.hpp"
#include "fake_cuda.h"
#include "input.hpp"
#include "pread.hpp"

namespace pyint8::testing {

// What goes wrong, as the input has it; all is well again when it ends.
class Trouble {
 public:
  explicit Trouble(Input& input) {
    constexpr int kErrors[] = {EINTR, EIO, ESTALE, EAGAIN, ENOMEM, ETIMEDOUT};
    if (input.once_in(3)) most_at_once = input.pick(1, 5000);
    if (input.once_in(4)) {
      read_failure = input.among(kErrors);
      reads_left = static_cast<int>(input.pick(0, 20));
      if (read_failure != EINTR) allow(ErrorCode::kIo);
    }
    if (input.once_in(4)) fail_driver(input);
  }
  ~Trouble() {
    reads_left = -1;
    most_at_once = static_cast<std::size_t>(-1);
  }
  Trouble(const Trouble&) = delete;
  Trouble& operator=(const Trouble&) = delete;

  void allow(ErrorCode code) { allowed_.insert(code); }

  // Whether it went well; if it did not, for a reason that there is.
  bool passes(const std::function<void()>& action) const {
    try {
      action();
    } catch (const Error& error) {
      require(allowed_.contains(error.code()), "no reason for: " + error.message());
      return false;
    }
    return true;
  }

 private:
  void fail_driver(Input& input) {
    constexpr const char* kCalls[] = {"cuCtxPopCurrent_v2",   "cuStreamCreate",       "cuStreamSynchronize",
                                      "cuStreamWaitEvent",    "cuEventCreate",        "cuEventRecord",
                                      "cuEventQuery",         "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoDAsync_v2",
                                      "cuMemHostRegister_v2", "cuMemHostUnregister",  "cuModuleLoadDataEx",
                                      "cuModuleGetFunction",  "cuLaunchKernel",       "cuEventSynchronize"};
    constexpr int kResults[] = {1, 2, 4, 201, 700, 719, 999, 54321};
    const char* call = input.among(kCalls);
    const int nth = static_cast<int>(input.pick(1, 40));
    fake_cuda_fail_after(call, nth, input.among(kResults));
    allow(ErrorCode::kDriver);
  }

  std::set<ErrorCode> allowed_;
};

// To be created first and ended last: asks whether anything is left.
class NothingLeft {
 public:
  NothingLeft() { fake_cuda_reset(); }
  ~NothingLeft() {
    const FakeCudaCounters end = counters();
    fake_cuda_reset();
    require(end.contexts == 0, "no context is left");
    require(end.streams == 0 && end.events == 0 && end.modules == 0, "no stream, event or module is left");
    require(end.registered_bytes == 0 && pinned_bytes_in_use() == 0, "no memory is pinned");
    require(end.violations == 0, "nothing is done that a GPU would mind");
  }
  NothingLeft(const NothingLeft&) = delete;
  NothingLeft& operator=(const NothingLeft&) = delete;
};

template <typename Run>
void leaving_nothing(Input& input) {
  const NothingLeft nothing_left;
  Run run(input);
  run();
}

}  // namespace pyint8::testing
