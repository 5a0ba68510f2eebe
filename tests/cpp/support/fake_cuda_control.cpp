#include "fake_cuda.h"
#include "fake_cuda_driver.hpp"

using namespace fake_cuda;

extern "C" {

void fake_cuda_counters(FakeCudaCounters* counters) {
  const std::lock_guard lock(driver().mutex);
  *counters = {};
  for (const Context& device : driver().devices) counters->contexts += device.retains;
  counters->streams = static_cast<std::int64_t>(driver().streams.size());
  counters->events = static_cast<std::int64_t>(driver().events.size());
  counters->modules = static_cast<std::int64_t>(driver().modules.size());
  for (const auto& [base, registration] : driver().registered) {
    counters->registered_bytes += static_cast<std::int64_t>(registration->nbytes);
  }
  for (const auto& [base, allocation] : driver().memory) {
    counters->device_bytes += static_cast<std::int64_t>(allocation.first);
  }
  counters->peer_accesses = static_cast<std::int64_t>(driver().peers.size());
  counters->pageable_copies = driver().pageable_copies;
  counters->violations = driver().violations;
}

void fake_cuda_fail_after(const char* entry_point, int nth_call, int result) {
  const std::lock_guard lock(driver().mutex);
  if (nth_call == 0) {
    driver().failures.erase(entry_point);
  } else {
    driver().failures[entry_point] = {nth_call, result};
  }
}

void fake_cuda_hide(const void* begin, std::uint64_t nbytes) {
  const std::lock_guard lock(driver().mutex);
  driver().hidden = {reinterpret_cast<CuDevicePtr>(begin), nbytes};
}

std::int64_t fake_cuda_calls(const char* entry_point) {
  const std::lock_guard lock(driver().mutex);
  return driver().calls[entry_point];
}

void fake_cuda_reset() {
  std::vector<std::unique_ptr<Stream>> destroyed;  // joined below, when the lock is gone
  const std::lock_guard lock(driver().mutex);
  destroyed.swap(driver().destroyed);
  driver().failures.clear();
  driver().calls.clear();
  driver().registered.clear();
  driver().hidden = {};
  driver().order.clear();
  driver().pageable_copies = 0;
  driver().violations = 0;
}

}  // extern "C"
