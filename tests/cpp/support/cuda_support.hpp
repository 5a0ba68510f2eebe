// The other side of the driver: what torch does beside us, and the fake's accounts.
#pragma once

#include <functional>
#include <latch>
#include <memory>

#include "device/device_cuda.hpp"
#include "device/kernel_images.hpp"
#include "fake_cuda.h"
#include "support.hpp"

namespace pyint8::testing {

std::shared_ptr<const CudaApi> fake_driver();

FakeCudaCounters counters();

void wait_until_passed(Event& event);

// The tests stand in for the kernels that a build has: machine code for 9.0, 8.0 and 7.5, and PTX. While one
// of these lives, there are only some.
class OnlyKernelImages {
 public:
  explicit OnlyKernelImages(std::span<const KernelImage> only);
  ~OnlyKernelImages();
};

// Starts the fake's accounts afresh; at the end nothing must be left and nothing done that a GPU would mind.
class Accounts {
 public:
  Accounts();
  ~Accounts();
  Accounts(const Accounts&) = delete;
  Accounts& operator=(const Accounts&) = delete;

  // For tests that cause a violation on purpose, or stop the driver from taking things back.
  void ignore() { ignored_ = true; }

 private:
  bool ignored_ = false;
};

// A caller such as torch: it holds a primary context and computes on a stream of its own.
class Caller {
 public:
  explicit Caller(int ordinal);
  ~Caller();
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

  StreamHandle stream() const { return reinterpret_cast<StreamHandle>(stream_); }
  // Puts work on the stream; `on_default`: on the legacy default stream instead.
  void then(std::function<void()> work, bool on_default = false);
  void synchronize(bool on_default = false);

 private:
  CudaContext context_;
  CuStream stream_ = nullptr;
};

// Holds a stream up until it is opened, at the latest by its destructor.
class Gate {
 public:
  explicit Gate(Caller& caller) {
    caller.then([latch = latch_] { latch->wait(); });
  }
  ~Gate() { open(); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  void open() {
    if (!latch_->try_wait()) latch_->count_down();
  }

 private:
  std::shared_ptr<std::latch> latch_ = std::make_shared<std::latch>(1);
};

}  // namespace pyint8::testing
