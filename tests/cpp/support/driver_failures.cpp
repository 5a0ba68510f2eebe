#include "driver_failures.hpp"

#include <cstdlib>
#include <string>

namespace pyint8::testing {
namespace {

constexpr const char* kEntryPoints[] = {"cuInit",
                                        "cuDeviceGet",
                                        "cuDevicePrimaryCtxRetain",
                                        "cuDevicePrimaryCtxRelease_v2",
                                        "cuCtxPushCurrent_v2",
                                        "cuCtxPopCurrent_v2",
                                        "cuStreamCreate",
                                        "cuStreamDestroy_v2",
                                        "cuStreamSynchronize",
                                        "cuStreamWaitEvent",
                                        "cuEventCreate",
                                        "cuEventDestroy_v2",
                                        "cuEventRecord",
                                        "cuEventQuery",
                                        "cuEventElapsedTime",
                                        "cuMemcpyHtoDAsync_v2",
                                        "cuMemcpyDtoDAsync_v2",
                                        "cuMemHostRegister_v2",
                                        "cuMemHostUnregister",
                                        "cuDeviceCanAccessPeer",
                                        "cuCtxEnablePeerAccess",
                                        "cuCtxDisablePeerAccess",
                                        "cuPointerGetAttribute",
                                        "cuMemAlloc_v2",
                                        "cuMemFree_v2",
                                        "cuModuleLoadDataEx",
                                        "cuModuleUnload",
                                        "cuModuleGetFunction",
                                        "cuLaunchKernel"};

// Out of memory, shutting down, no context, not ready, an illegal address, a failed launch, unknown, and one
// that the driver has no name for.
constexpr int kResults[] = {2, 4, 201, 600, 700, 719, 999, 54321};
constexpr int kUsual = 719;  // where not all are tried

bool every_fault() {
  const char* wanted = std::getenv("PYINT8_TEST_EVERY_FAULT");
  return wanted != nullptr && std::string(wanted) == "1";
}

// Of those that the fake driver has names for.
std::string words_for(int result) {
  if (result == 2) return "CUDA_ERROR_OUT_OF_MEMORY";
  if (result == 201) return "CUDA_ERROR_INVALID_CONTEXT";
  return result == kUsual ? "CUDA_ERROR_LAUNCH_FAILED" : std::to_string(result);
}

// Whether it succeeded.
bool try_to_run(Load& load, const std::string& failing, int result) {
  bool succeeded = false;
  try {
    load.run();
    succeeded = true;
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kDriver);
    CHECK_MESSAGE(contains(error.message(), words_for(result)), error.message());
  }
  fake_cuda_fail_after(failing.c_str(), 0, 0);  // if it has not come yet, let it not be the callers'
  load.synchronize();
  return succeeded;
}

std::size_t calls_in_a_load(Load& load, const std::string& entry_point) {
  fake_cuda_reset();
  REQUIRE(try_to_run(load, entry_point, 0));
  CHECK(load.arrived());
  return static_cast<std::size_t>(fake_cuda_calls(entry_point.c_str()));
}

void same(const FakeCudaCounters& before, const FakeCudaCounters& after) {
  CHECK(after.contexts == before.contexts);
  CHECK(after.streams == before.streams);
  CHECK(after.events == before.events);
  CHECK(after.modules == before.modules);
  CHECK(after.registered_bytes == before.registered_bytes);
  CHECK(after.device_bytes == before.device_bytes);
  CHECK(after.peer_accesses == before.peer_accesses);
  CHECK(after.violations == 0);
  CHECK(pinned_bytes_in_use() == 0);
}

// Whether it succeeded.
bool fail_at(Load& load, const std::string& entry_point, std::size_t call, int result) {
  fake_cuda_reset();
  const FakeCudaCounters before = counters();
  const std::size_t threads = running_threads();
  const std::size_t files = open_files();
  fake_cuda_fail_after(entry_point.c_str(), static_cast<int>(call), result);
  const bool succeeded = try_to_run(load, entry_point, result);
  const FakeCudaCounters after = counters();
  fake_cuda_reset();  // joins the streams
  // A destructor that cannot make its context current takes the driver to be shutting down.
  if (succeeded && entry_point == "cuCtxPushCurrent_v2") return true;
  same(before, after);
  CHECK(threads_become(threads));
  CHECK(open_files() == files);
  return succeeded;
}

}  // namespace

std::vector<std::size_t> some_up_to(std::size_t last) {
  std::vector<std::size_t> calls;
  if (every_fault()) {
    for (std::size_t call = 1; call <= last; ++call) calls.push_back(call);
    return calls;
  }
  for (std::size_t a = 1, b = 2; a <= last; b += a, a = b - a) calls.push_back(a);
  for (std::size_t call = last > 2 ? last - 2 : 1; call <= last; ++call) calls.push_back(call);
  return calls;
}

std::size_t fail_each_call(const std::function<std::unique_ptr<Load>()>& make) {
  std::size_t failures = 0;
  for (const std::string entry_point : kEntryPoints) {
    CAPTURE(entry_point);
    for (const std::size_t call : some_up_to(calls_in_a_load(*make(), entry_point))) {
      CAPTURE(call);
      for (const int result : kResults) {
        if (result != kUsual && !every_fault()) continue;
        CAPTURE(result);
        failures += fail_at(*make(), entry_point, call, result) ? 0 : 1;
      }
    }
  }
  return failures;
}

}  // namespace pyint8::testing
