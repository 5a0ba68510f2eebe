#include "driver_failures.hpp"

#include <algorithm>
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
                                        "cuMemcpyHtoDAsync_v2",
                                        "cuMemcpyDtoDAsync_v2",
                                        "cuMemHostRegister_v2",
                                        "cuMemHostUnregister",
                                        "cuModuleLoadDataEx",
                                        "cuModuleUnload",
                                        "cuModuleGetFunction",
                                        "cuLaunchKernel"};

// Whether it succeeded.
bool try_to_run(Load& load, const std::string& failing) {
  bool succeeded = false;
  try {
    load.run();
    succeeded = true;
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::kDriver);
    CHECK_MESSAGE(contains(error.message(), "CUDA_ERROR_LAUNCH_FAILED"), error.message());
  }
  fake_cuda_fail_after(failing.c_str(), 0, 0);  // if it has not come yet, let it not be the callers'
  load.synchronize();
  return succeeded;
}

int calls_in_a_load(Load& load, const std::string& entry_point) {
  fake_cuda_reset();
  REQUIRE(try_to_run(load, entry_point));
  CHECK(load.arrived());
  return static_cast<int>(fake_cuda_calls(entry_point.c_str()));
}

std::vector<int> some_up_to(int last) {
  std::vector<int> calls;
  for (int a = 1, b = 2; a <= last; b += a, a = b - a) calls.push_back(a);
  for (int call = std::max(1, last - 2); call <= last; ++call) calls.push_back(call);
  return calls;
}

void same(const FakeCudaCounters& before, const FakeCudaCounters& after) {
  CHECK(after.contexts == before.contexts);
  CHECK(after.streams == before.streams);
  CHECK(after.events == before.events);
  CHECK(after.modules == before.modules);
  CHECK(after.registered_bytes == before.registered_bytes);
  CHECK(after.violations == 0);
  CHECK(pinned_bytes_in_use() == 0);
}

// Whether it succeeded.
bool fail_at(Load& load, const std::string& entry_point, int call) {
  fake_cuda_reset();
  const FakeCudaCounters before = counters();
  const std::size_t threads = running_threads();
  const std::size_t files = open_files();
  fake_cuda_fail_after(entry_point.c_str(), call, 719);
  const bool succeeded = try_to_run(load, entry_point);
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

std::size_t fail_each_call(const std::function<std::unique_ptr<Load>()>& make) {
  std::size_t failures = 0;
  for (const std::string entry_point : kEntryPoints) {
    CAPTURE(entry_point);
    for (const int call : some_up_to(calls_in_a_load(*make(), entry_point))) {
      CAPTURE(call);
      failures += fail_at(*make(), entry_point, call) ? 0 : 1;
    }
  }
  return failures;
}

}  // namespace pyint8::testing
