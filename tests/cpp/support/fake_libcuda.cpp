// A CUDA driver without a GPU: the entry points of csrc/core/device/cuda_api.hpp over host memory (a device
// pointer is a host address), asynchronous as the real one is and stricter about misuse. It also fails on
// request.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "fake_cuda.h"
#include "fake_cuda_driver.hpp"
#include "fake_cuda_kernels.hpp"

using namespace fake_cuda;

#define RETURN_IF(condition, error) \
  if (condition) return error
#define BEGIN(entry_point) \
  Call call(entry_point);  \
  RETURN_IF(call.result != 0, call.result)
#define BEGIN_IN_CONTEXT(entry_point) \
  BEGIN(entry_point);                 \
  RETURN_IF(call.context == nullptr, kInvalidContext)

extern "C" {

CuResult cuInit(unsigned flags) {
  BEGIN("cuInit");
  RETURN_IF(flags != 0, kInvalidValue);
  return driver().devices.empty() ? kNoDevice : kSuccess;
}

CuResult cuGetErrorName(CuResult error, const char** name) {
  static const std::map<CuResult, const char*> names = {
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {2, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNoDevice, "CUDA_ERROR_NO_DEVICE"},
      {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
      {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kNoBinary, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
      {kInvalidPtx, "CUDA_ERROR_INVALID_PTX"},
      {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {kNotFound, "CUDA_ERROR_NOT_FOUND"},
      {kAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
      {kNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
      {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"},
  };
  const auto found = names.find(error);
  *name = found == names.end() ? nullptr : found->second;
  return *name == nullptr ? kInvalidValue : kSuccess;
}

CuResult cuGetErrorString(CuResult error, const char** text) {
  const char* name = nullptr;
  *text = cuGetErrorName(error, &name) == kSuccess ? "said the fake driver" : nullptr;
  return *text == nullptr ? kInvalidValue : kSuccess;
}

CuResult cuDeviceGet(CuDevice* device, int ordinal) {
  BEGIN("cuDeviceGet");
  RETURN_IF(ordinal < 0 || static_cast<std::size_t>(ordinal) >= driver().devices.size(), kInvalidDevice);
  *device = ordinal;
  return kSuccess;
}

CuResult cuDeviceGetAttribute(int* value, int attribute, CuDevice) {
  BEGIN("cuDeviceGetAttribute");
  RETURN_IF(attribute != kComputeCapabilityMajor && attribute != kComputeCapabilityMinor, kInvalidValue);
  *value = attribute == kComputeCapabilityMajor ? 8 : 6;
  return kSuccess;
}

CuResult cuDevicePrimaryCtxRetain(CuContext* context, CuDevice device) {
  BEGIN("cuDevicePrimaryCtxRetain");
  Context& primary = driver().devices.at(device);
  ++primary.retains;
  *context = reinterpret_cast<CuContext>(&primary);
  return kSuccess;
}

CuResult cuDevicePrimaryCtxRelease_v2(CuDevice device) {
  const Call call("cuDevicePrimaryCtxRelease_v2");
  Context& primary = driver().devices.at(device);
  RETURN_IF(primary.retains == 0, kInvalidContext);
  if (--primary.retains == 0) driver().destroy(&primary);
  return call.result;
}

CuResult cuCtxPushCurrent_v2(CuContext context) {
  BEGIN("cuCtxPushCurrent_v2");
  auto* pushed = reinterpret_cast<Context*>(context);
  RETURN_IF(pushed == nullptr || pushed->retains == 0, kInvalidContext);
  context_stack.push_back(pushed);
  return kSuccess;
}

CuResult cuCtxPopCurrent_v2(CuContext* context) {
  const Call call("cuCtxPopCurrent_v2");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  *context = reinterpret_cast<CuContext>(call.context);
  context_stack.pop_back();
  return call.result;
}

CuResult cuStreamCreate(CuStream* stream, unsigned flags) {
  BEGIN_IN_CONTEXT("cuStreamCreate");
  RETURN_IF(flags > kStreamNonBlocking, kInvalidValue);
  auto made = driver().make_stream(call.context);
  *stream = reinterpret_cast<CuStream>(made.get());
  driver().streams.emplace(*stream, std::move(made));
  return kSuccess;
}

CuResult cuStreamDestroy_v2(CuStream handle) {
  const Call call("cuStreamDestroy_v2");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  const auto found = driver().streams.find(handle);
  RETURN_IF(found == driver().streams.end(), kInvalidHandle);
  found->second->close();
  driver().destroyed.push_back(std::move(found->second));
  driver().streams.erase(found);
  return call.result;
}

CuResult cuStreamSynchronize(CuStream handle) {
  Call call("cuStreamSynchronize");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  Stream* stream = find_stream(handle, call.context);
  RETURN_IF(stream == nullptr, kInvalidHandle);
  call.unlock();
  stream->synchronize();
  return call.result;
}

CuResult cuStreamWaitEvent(CuStream handle, CuEvent event_handle, unsigned flags) {
  BEGIN_IN_CONTEXT("cuStreamWaitEvent");
  Stream* stream = find_stream(handle, call.context);
  const Event* event = find_event(event_handle);
  RETURN_IF(stream == nullptr || event == nullptr, kInvalidHandle);
  RETURN_IF(flags != 0, kInvalidValue);
  if (event->last != nullptr) stream->push([moment = event->last] { moment->wait(); });
  return kSuccess;
}

CuResult cuEventCreate(CuEvent* handle, unsigned flags) {
  BEGIN_IN_CONTEXT("cuEventCreate");
  RETURN_IF(flags > kEventDisableTiming + 1, kInvalidValue);
  auto event = std::make_unique<Event>(Event{call.context, nullptr});
  *handle = reinterpret_cast<CuEvent>(event.get());
  driver().events.emplace(*handle, std::move(event));
  return kSuccess;
}

CuResult cuEventDestroy_v2(CuEvent handle) {
  const Call call("cuEventDestroy_v2");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  return driver().events.erase(handle) == 0 ? CuResult{kInvalidHandle} : call.result;
}

CuResult cuEventRecord(CuEvent event_handle, CuStream handle) {
  BEGIN_IN_CONTEXT("cuEventRecord");
  Stream* stream = find_stream(handle, call.context);
  Event* event = find_event(event_handle);
  RETURN_IF(stream == nullptr || event == nullptr || stream->context() != event->context, kInvalidHandle);
  event->last = std::make_shared<Moment>();
  stream->push([moment = event->last] { moment->pass(); });
  return kSuccess;
}

CuResult cuEventQuery(CuEvent handle) {
  BEGIN_IN_CONTEXT("cuEventQuery");
  const Event* event = find_event(handle);
  RETURN_IF(event == nullptr, kInvalidHandle);
  return event->last == nullptr || event->last->has_passed() ? kSuccess : kNotReady;
}

CuResult cuEventSynchronize(CuEvent handle) {
  Call call("cuEventSynchronize");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  const Event* event = find_event(handle);
  RETURN_IF(event == nullptr, kInvalidHandle);
  const std::shared_ptr<Moment> moment = event->last;
  call.unlock();
  if (moment != nullptr) moment->wait();
  return call.result;
}

CuResult cuMemcpyHtoDAsync_v2(CuDevicePtr to, const void* from, std::size_t nbytes, CuStream handle) {
  BEGIN_IN_CONTEXT("cuMemcpyHtoDAsync_v2");
  Stream* stream = find_stream(handle, call.context);
  RETURN_IF(stream == nullptr || stream->context() != call.context, kInvalidHandle);
  if (auto source = registration_of(from, nbytes)) {
    ++source->readers;
    stream->push([=] {
      std::memcpy(reinterpret_cast<void*>(to), from, nbytes);
      source->readers.fetch_sub(1, std::memory_order_relaxed);  // for the count: orders nothing, as on a GPU
    });
  } else {  // the driver copies pageable memory aside before it returns
    ++driver().pageable_copies;
    const auto* bytes = static_cast<const std::byte*>(from);
    stream->push([to, aside = std::vector<std::byte>(bytes, bytes + nbytes)] {
      std::memcpy(reinterpret_cast<void*>(to), aside.data(), aside.size());
    });
  }
  return kSuccess;
}

CuResult cuMemcpyDtoDAsync_v2(CuDevicePtr to, CuDevicePtr from, std::size_t nbytes, CuStream handle) {
  BEGIN_IN_CONTEXT("cuMemcpyDtoDAsync_v2");
  Stream* stream = find_stream(handle, call.context);
  RETURN_IF(stream == nullptr || stream->context() != call.context, kInvalidHandle);
  stream->push(
      [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), nbytes); });
  return kSuccess;
}

// Device memory is the host's; for programs that have no allocator of their own.
CuResult cuMemAlloc_v2(CuDevicePtr* memory, std::size_t nbytes) {
  BEGIN_IN_CONTEXT("cuMemAlloc_v2");
  *memory = reinterpret_cast<CuDevicePtr>(std::malloc(nbytes));
  return *memory == 0 ? 2 : kSuccess;
}

CuResult cuMemFree_v2(CuDevicePtr memory) {
  const Call call("cuMemFree_v2");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  std::free(reinterpret_cast<void*>(memory));
  return call.result;
}

CuResult cuMemHostRegister_v2(void* address, std::size_t nbytes, unsigned flags) {
  BEGIN_IN_CONTEXT("cuMemHostRegister_v2");
  RETURN_IF(address == nullptr || nbytes == 0 || flags > kHostRegisterPortable, kInvalidValue);
  auto registration = std::make_shared<Registration>();
  registration->nbytes = nbytes;
  const bool added = driver().registered.emplace(static_cast<std::byte*>(address), registration).second;
  return added ? kSuccess : kAlreadyRegistered;
}

CuResult cuMemHostUnregister(void* address) {
  const Call call("cuMemHostUnregister");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  const auto found = driver().registered.find(static_cast<std::byte*>(address));
  RETURN_IF(found == driver().registered.end(), kNotRegistered);
  if (found->second->readers != 0) ++driver().violations;
  while (found->second->readers != 0) std::this_thread::yield();  // so that the test fails and does not crash
  driver().registered.erase(found);
  return call.result;
}

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
  driver().modules.emplace(*module, call.context);
  return kSuccess;
}

CuResult cuModuleUnload(CuModule module) {
  const Call call("cuModuleUnload");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  if (*call.context->kernels != 0) ++driver().violations;  // their code goes
  return driver().modules.erase(module) == 0 ? CuResult{kInvalidHandle} : call.result;
}

CuResult cuModuleGetFunction(CuFunction* function, CuModule module, const char* name) {
  BEGIN_IN_CONTEXT("cuModuleGetFunction");
  RETURN_IF(!driver().modules.contains(module), kInvalidHandle);
  const auto* kernel =
      std::find_if(kKernels.begin(), kKernels.end(), [&](const Kernel& k) { return k.name == name; });
  RETURN_IF(kernel == kKernels.end(), kNotFound);
  *function = reinterpret_cast<CuFunction>(const_cast<Kernel*>(kernel));
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
  const auto* kernel = reinterpret_cast<const Kernel*>(function);
  KernelArguments copies{};  // made now: the caller's are gone when the kernel runs
  for (std::size_t i = 0; i < kernel->arguments; ++i) std::memcpy(&copies[i], arguments[i], sizeof copies[i]);
  ++*call.context->kernels;
  stream->push([=, running = call.context->kernels] {
    run(*kernel, copies, grid_x, grid_y);
    --*running;
  });
  return kSuccess;
}

// bitsandbytes' entry point, which is not the driver's: puts its kernel on the stream. It takes NaN for 0,
// and infinity for a row's largest value, as theirs does.
void cint8_vector_quant(const void* half, void* codes, void* scales, float threshold, int rows, int columns,
                        std::uintptr_t handle) {
  const Call call("cint8_vector_quant");
  Stream* stream =
      call.context == nullptr ? nullptr : find_stream(reinterpret_cast<CuStream>(handle), call.context);
  if (stream == nullptr || stream->context() != call.context || threshold != 0) {
    ++driver().violations;
    return;
  }
  stream->push([=] { quantize_rows(half, codes, scales, rows, columns); });
}

int cuLaunchHostFunc(CUstream_st* handle, void (*work)(void*), void* data) {
  BEGIN_IN_CONTEXT("cuLaunchHostFunc");
  Stream* stream = find_stream(reinterpret_cast<CuStream>(handle), call.context);
  RETURN_IF(stream == nullptr, kInvalidHandle);
  stream->push([=] { work(data); });
  return kSuccess;
}

}  // extern "C"
