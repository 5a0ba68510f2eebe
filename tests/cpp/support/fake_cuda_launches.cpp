// The part of the fake driver that knows kernels: modules, launches, and bitsandbytes' entry point.
#include <algorithm>
#include <cstdio>
#include <string_view>

#include "fake_cuda.h"
#include "fake_cuda_driver.hpp"
#include "fake_cuda_kernels.hpp"

using namespace fake_cuda;

extern "C" {

CuResult cuModuleLoadDataEx(CuModule* module, const void* image, unsigned count, int* options,
                            void** values) {
  const Call call("cuModuleLoadDataEx");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  if (call.result != kSuccess) {
    char* log = nullptr;
    std::size_t log_bytes = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (options[i] == kJitErrorLogBuffer) log = static_cast<char*>(values[i]);
      if (options[i] == kJitErrorLogBufferSizeBytes) log_bytes = reinterpret_cast<std::uintptr_t>(values[i]);
    }
    if (log != nullptr) std::snprintf(log, log_bytes, "the fake compiler's log");
    return call.result;
  }
  const std::string_view text(static_cast<const char*>(image));
  RETURN_IF(text.empty(), kInvalidPtx);
  RETURN_IF(text.starts_with("machine code") && text != "machine code 80", kNoBinary);
  *module = reinterpret_cast<CuModule>(++driver().modules_made);
  driver().modules.emplace(*module, Module{call.context});
  return kSuccess;
}

CuResult cuModuleUnload(CuModule module) {
  const Call call("cuModuleUnload");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  const auto found = driver().modules.find(module);
  RETURN_IF(found == driver().modules.end(), kInvalidHandle);
  const std::atomic<int>& running = *found->second.running;
  if (running != 0) ++driver().violations;
  while (running != 0) std::this_thread::yield();  // so that the test fails and does not crash
  driver().modules.erase(found);
  return call.result;
}

CuResult cuModuleGetFunction(CuFunction* function, CuModule module, const char* name) {
  BEGIN_IN_CONTEXT("cuModuleGetFunction");
  const auto found = driver().modules.find(module);
  RETURN_IF(found == driver().modules.end(), kInvalidHandle);
  const auto* kernel =
      std::find_if(kKernels.begin(), kKernels.end(), [&](const Kernel& k) { return k.name == name; });
  RETURN_IF(kernel == kKernels.end(), kNotFound);
  Function& asked = found->second.functions.try_emplace(name, kernel, found->second.running).first->second;
  *function = reinterpret_cast<CuFunction>(&asked);
  return kSuccess;
}

CuResult cuLaunchKernel(CuFunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CuStream handle, void** arguments, void** extra) {
  BEGIN_IN_CONTEXT("cuLaunchKernel");
  RETURN_IF(grid_x == 0 || grid_y == 0 || grid_y > 65535 || grid_z != 1, kInvalidValue);
  RETURN_IF(block_x != kTile || block_y != kRows || block_z != 1, kInvalidValue);
  RETURN_IF(shared_bytes != 0 || extra != nullptr, kInvalidValue);
  Stream* stream = find_stream(handle, call.context);
  RETURN_IF(stream == nullptr || stream->context() != call.context, kInvalidHandle);
  const auto& [kernel, running] = *reinterpret_cast<const Function*>(function);
  KernelArguments copies{};  // made now: the caller's are gone when the kernel runs
  for (std::size_t i = 0; i < kernel->arguments; ++i) std::memcpy(&copies[i], arguments[i], sizeof copies[i]);
  ++*running;
  driver().put(*stream, accesses_of(*kernel, copies), [=, kernel = kernel, running = running] {
    run(*kernel, copies, grid_x, grid_y);
    running->fetch_sub(1, std::memory_order_relaxed);  // for the count: orders nothing, as on a GPU
  });
  return kSuccess;
}

void cint8_vector_quant(const void* half, void* codes, void* scales, float threshold, int rows, int columns,
                        std::uintptr_t handle) {
  const Call call("cint8_vector_quant");
  Stream* stream =
      call.context == nullptr ? nullptr : find_stream(reinterpret_cast<CuStream>(handle), call.context);
  if (stream == nullptr || stream->context() != call.context || threshold != 0) {
    ++driver().violations;
    return;
  }
  const std::uint64_t elements = std::uint64_t(rows) * columns;
  const std::vector<Access> accesses = {
      {reinterpret_cast<std::uint64_t>(half), elements * 2, false},
      {reinterpret_cast<std::uint64_t>(codes), elements, true},
      {reinterpret_cast<std::uint64_t>(scales), rows * sizeof(float), true}};
  driver().put(*stream, accesses, [=] { quantize_rows(half, codes, scales, rows, columns); });
}

}  // extern "C"
