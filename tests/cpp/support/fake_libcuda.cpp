// A CUDA driver without a GPU: the entry points of csrc/core/device/cuda_api.hpp over host memory (a device
// pointer is a host address), asynchronous as the real one is and stricter about misuse. It also fails on
// request.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "fake_cuda.h"
#include "fake_cuda_driver.hpp"

using namespace fake_cuda;

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
  driver().order.forget(found->second->number());
  driver().destroyed.push_back(std::move(found->second));
  driver().streams.erase(found);
  return call.result;
}

CuResult cuStreamSynchronize(CuStream handle) {
  Call call("cuStreamSynchronize");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  Stream* stream = find_stream(handle, call.context);
  RETURN_IF(stream == nullptr, kInvalidHandle);
  const Clock before = driver().order.of(stream->number());
  call.unlock();
  stream->synchronize();
  call.lock();
  driver().order.host_saw(before);
  return call.result;
}

CuResult cuStreamWaitEvent(CuStream handle, CuEvent event_handle, unsigned flags) {
  BEGIN_IN_CONTEXT("cuStreamWaitEvent");
  Stream* stream = find_stream(handle, call.context);
  const Event* event = find_event(event_handle);
  RETURN_IF(stream == nullptr || event == nullptr, kInvalidHandle);
  RETURN_IF(flags != 0, kInvalidValue);
  if (event->last == nullptr) return kSuccess;
  driver().order.wait(stream->number(), event->before);
  stream->push([moment = event->last] { moment->wait(); });
  return kSuccess;
}

CuResult cuEventCreate(CuEvent* handle, unsigned flags) {
  BEGIN_IN_CONTEXT("cuEventCreate");
  RETURN_IF(flags > kEventDisableTiming + 1, kInvalidValue);
  auto event = std::make_unique<Event>(Event{call.context, nullptr, {}, (flags & kEventDisableTiming) == 0});
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
  event->before = driver().order.of(stream->number());
  stream->push([moment = event->last] { moment->pass(); });
  return kSuccess;
}

CuResult cuEventQuery(CuEvent handle) {
  BEGIN_IN_CONTEXT("cuEventQuery");
  const Event* event = find_event(handle);
  RETURN_IF(event == nullptr, kInvalidHandle);
  if (event->last == nullptr) return kSuccess;
  if (!event->last->has_passed()) return kNotReady;
  driver().order.host_saw(event->before);
  return kSuccess;
}

CuResult cuEventSynchronize(CuEvent handle) {
  Call call("cuEventSynchronize");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  const Event* event = find_event(handle);
  RETURN_IF(event == nullptr, kInvalidHandle);
  if (event->last == nullptr) return call.result;
  const std::shared_ptr<Moment> moment = event->last;
  const Clock before = event->before;
  call.unlock();
  moment->wait();
  call.lock();
  driver().order.host_saw(before);
  return call.result;
}

CuResult cuEventElapsedTime(float* milliseconds, CuEvent start_handle, CuEvent end_handle) {
  BEGIN_IN_CONTEXT("cuEventElapsedTime");
  const Event* start = find_event(start_handle);
  const Event* end = find_event(end_handle);
  RETURN_IF(start == nullptr || end == nullptr || !start->is_timed || !end->is_timed, kInvalidHandle);
  RETURN_IF(start->last == nullptr || end->last == nullptr, kInvalidHandle);
  RETURN_IF(!start->last->has_passed() || !end->last->has_passed(), kNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(end->last->when() - start->last->when()).count();
  return kSuccess;
}

CuResult cuMemcpyHtoDAsync_v2(CuDevicePtr to, const void* from, std::size_t nbytes, CuStream handle) {
  BEGIN_IN_CONTEXT("cuMemcpyHtoDAsync_v2");
  Stream* stream = find_stream(handle, call.context);
  RETURN_IF(stream == nullptr || stream->context() != call.context, kInvalidHandle);
  if (auto source = registration_of(from, nbytes)) {
    ++source->readers;
    driver().put(*stream, {{to, nbytes, true}}, [=] {
      std::memcpy(reinterpret_cast<void*>(to), from, nbytes);
      source->readers.fetch_sub(1, std::memory_order_relaxed);  // for the count: orders nothing, as on a GPU
    });
  } else {  // the driver copies pageable memory aside before it returns
    ++driver().pageable_copies;
    const auto* bytes = static_cast<const std::byte*>(from);
    driver().put(*stream, {{to, nbytes, true}}, [to, aside = std::vector<std::byte>(bytes, bytes + nbytes)] {
      std::memcpy(reinterpret_cast<void*>(to), aside.data(), aside.size());
    });
  }
  return kSuccess;
}

CuResult cuMemcpyDtoDAsync_v2(CuDevicePtr to, CuDevicePtr from, std::size_t nbytes, CuStream handle) {
  BEGIN_IN_CONTEXT("cuMemcpyDtoDAsync_v2");
  Stream* stream = find_stream(handle, call.context);
  RETURN_IF(stream == nullptr || stream->context() != call.context, kInvalidHandle);
  driver().put(*stream, {{from, nbytes, false}, {to, nbytes, true}}, [=] {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), nbytes);
  });
  return kSuccess;
}

CuResult cuDeviceCanAccessPeer(int* can, CuDevice device, CuDevice peer) {
  BEGIN("cuDeviceCanAccessPeer");
  constexpr CuDevice kHermit = 3;
  *can = device != peer && device != kHermit && peer != kHermit ? 1 : 0;
  return kSuccess;
}

CuResult cuCtxEnablePeerAccess(CuContext peer, unsigned flags) {
  BEGIN_IN_CONTEXT("cuCtxEnablePeerAccess");
  const auto* to = reinterpret_cast<const Context*>(peer);
  RETURN_IF(flags != 0, kInvalidValue);
  RETURN_IF(to == nullptr || to->retains == 0 || to == call.context, kInvalidContext);
  return driver().peers.emplace(call.context, to).second ? CuResult{kSuccess} : kPeerAccessAlreadyEnabled;
}

CuResult cuCtxDisablePeerAccess(CuContext peer) {
  const Call call("cuCtxDisablePeerAccess");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  const auto* to = reinterpret_cast<const Context*>(peer);
  return driver().peers.erase({call.context, to}) == 0 ? CuResult{kPeerAccessNotEnabled} : call.result;
}

// Memory is the host's, so whose it is cannot be told: a context with access to one has it to all.
CuResult cuPointerGetAttribute(void* value, int attribute, CuDevicePtr pointer) {
  BEGIN_IN_CONTEXT("cuPointerGetAttribute");
  RETURN_IF(attribute != kPointerAccessFlags, kInvalidValue);
  const bool has_access =
      std::ranges::any_of(driver().peers, [&](const auto& access) { return access.first == call.context; });
  const auto [begin, nbytes] = driver().hidden;
  *static_cast<int*>(value) = has_access && (pointer < begin || pointer >= begin + nbytes) ? kReadWrite : 0;
  return kSuccess;
}

// Device memory is the host's.
CuResult cuMemAlloc_v2(CuDevicePtr* memory, std::size_t nbytes) {
  BEGIN_IN_CONTEXT("cuMemAlloc_v2");
  auto* bytes = static_cast<std::byte*>(std::malloc(nbytes));
  RETURN_IF(bytes == nullptr, CuResult{2});
  driver().memory[bytes] = {nbytes, call.context};
  *memory = reinterpret_cast<CuDevicePtr>(bytes);
  return kSuccess;
}

CuResult cuMemFree_v2(CuDevicePtr memory) {
  const Call call("cuMemFree_v2");
  RETURN_IF(call.context == nullptr, kInvalidContext);
  RETURN_IF(driver().memory.erase(reinterpret_cast<const std::byte*>(memory)) == 0, kInvalidValue);
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

int cuLaunchHostFunc(CUstream_st* handle, void (*work)(void*), void* data) {
  BEGIN_IN_CONTEXT("cuLaunchHostFunc");
  Stream* stream = find_stream(reinterpret_cast<CuStream>(handle), call.context);
  RETURN_IF(stream == nullptr, kInvalidHandle);
  stream->push([=] { work(data); });
  return kSuccess;
}

}  // extern "C"
