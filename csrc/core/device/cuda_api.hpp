// The GPU driver, opened at run time: the only place that names one of its symbols.
//
// The extension links neither cudart nor libcuda, so one binary serves machines with and without a GPU, and
// every driver since CUDA 12.0 (525). The declarations follow NVIDIA's cuda.h, whose ABI is stable by version
// suffix.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace pyint8 {

using CuResult = int;
using CuDevice = int;
using CuDevicePtr = unsigned long long;
struct CuContextTag;
struct CuStreamTag;
struct CuEventTag;
struct CuModuleTag;
struct CuFunctionTag;
using CuContext = CuContextTag*;
using CuStream = CuStreamTag*;
using CuEvent = CuEventTag*;
using CuModule = CuModuleTag*;
using CuFunction = CuFunctionTag*;

inline constexpr unsigned kStreamNonBlocking = 1;           // CU_STREAM_NON_BLOCKING
inline constexpr CuResult kNotReady = 600;                  // CUDA_ERROR_NOT_READY
inline constexpr unsigned kEventDefault = 0;                // CU_EVENT_DEFAULT
inline constexpr unsigned kEventDisableTiming = 2;          // CU_EVENT_DISABLE_TIMING
inline constexpr unsigned kHostRegisterPortable = 1;        // CU_MEMHOSTREGISTER_PORTABLE
inline constexpr int kComputeCapabilityMajor = 75;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
inline constexpr int kComputeCapabilityMinor = 76;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
inline constexpr CuResult kPeerAccessAlreadyEnabled = 704;  // CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
inline constexpr int kPointerAccessFlags = 16;              // CU_POINTER_ATTRIBUTE_ACCESS_FLAGS
inline constexpr int kReadWrite = 3;                        // CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE
inline constexpr int kJitErrorLogBuffer = 5;                // CU_JIT_ERROR_LOG_BUFFER
inline constexpr int kJitErrorLogBufferSizeBytes = 6;       // CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES

// Every entry point used: member name, exported symbol, parameters.
#define PYINT8_CUDA_ENTRY_POINTS(X)                                                                         \
  X(init, "cuInit", (unsigned flags))                                                                       \
  X(get_error_name, "cuGetErrorName", (CuResult error, const char** name))                                  \
  X(get_error_string, "cuGetErrorString", (CuResult error, const char** text))                              \
  X(device_get, "cuDeviceGet", (CuDevice * device, int ordinal))                                            \
  X(device_get_attribute, "cuDeviceGetAttribute", (int* value, int attribute, CuDevice device))             \
  X(primary_context_retain, "cuDevicePrimaryCtxRetain", (CuContext * context, CuDevice device))             \
  X(primary_context_release, "cuDevicePrimaryCtxRelease_v2", (CuDevice device))                             \
  X(device_can_access_peer, "cuDeviceCanAccessPeer", (int* can, CuDevice device, CuDevice peer))            \
  X(context_enable_peer_access, "cuCtxEnablePeerAccess", (CuContext peer, unsigned flags))                  \
  X(context_disable_peer_access, "cuCtxDisablePeerAccess", (CuContext peer))                                \
  X(pointer_get_attribute, "cuPointerGetAttribute", (void* value, int attribute, CuDevicePtr pointer))      \
  X(memory_allocate, "cuMemAlloc_v2", (CuDevicePtr * memory, std::size_t nbytes))                           \
  X(memory_free, "cuMemFree_v2", (CuDevicePtr memory))                                                      \
  X(context_push, "cuCtxPushCurrent_v2", (CuContext context))                                               \
  X(context_pop, "cuCtxPopCurrent_v2", (CuContext * context))                                               \
  X(stream_create, "cuStreamCreate", (CuStream * stream, unsigned flags))                                   \
  X(stream_destroy, "cuStreamDestroy_v2", (CuStream stream))                                                \
  X(stream_synchronize, "cuStreamSynchronize", (CuStream stream))                                           \
  X(stream_wait_event, "cuStreamWaitEvent", (CuStream stream, CuEvent event, unsigned flags))               \
  X(event_create, "cuEventCreate", (CuEvent * event, unsigned flags))                                       \
  X(event_destroy, "cuEventDestroy_v2", (CuEvent event))                                                    \
  X(event_record, "cuEventRecord", (CuEvent event, CuStream stream))                                        \
  X(event_query, "cuEventQuery", (CuEvent event))                                                           \
  X(event_synchronize, "cuEventSynchronize", (CuEvent event))                                               \
  X(event_elapsed_time, "cuEventElapsedTime", (float* milliseconds, CuEvent start, CuEvent end))            \
  X(memcpy_to_device_async, "cuMemcpyHtoDAsync_v2",                                                         \
    (CuDevicePtr to, const void* from, std::size_t nbytes, CuStream stream))                                \
  X(memcpy_on_device_async, "cuMemcpyDtoDAsync_v2",                                                         \
    (CuDevicePtr to, CuDevicePtr from, std::size_t nbytes, CuStream stream))                                \
  X(host_register, "cuMemHostRegister_v2", (void* address, std::size_t nbytes, unsigned flags))             \
  X(host_unregister, "cuMemHostUnregister", (void* address))                                                \
  X(module_load, "cuModuleLoadDataEx",                                                                      \
    (CuModule * module, const void* image, unsigned count, int* options, void** values))                    \
  X(module_unload, "cuModuleUnload", (CuModule module))                                                     \
  X(module_get_function, "cuModuleGetFunction", (CuFunction * function, CuModule module, const char* name)) \
  X(launch_kernel, "cuLaunchKernel",                                                                        \
    (CuFunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,              \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, CuStream stream, void** arguments,          \
     void** extra))

class CudaApi {
 public:
  // Opens and initialises the driver library. Throws kDriver where it is absent, too old, or has no device.
  static std::shared_ptr<const CudaApi> open(const std::string& library);
  ~CudaApi();
  CudaApi(const CudaApi&) = delete;
  CudaApi& operator=(const CudaApi&) = delete;

  // Throws kDriver with the driver's own words if `result` is not success.
  void check(CuResult result, const char* what) const;

#define PYINT8_DECLARE(member, symbol, parameters) CuResult(*member) parameters = nullptr;
  PYINT8_CUDA_ENTRY_POINTS(PYINT8_DECLARE)
#undef PYINT8_DECLARE

 private:
  explicit CudaApi(void* library) : library_(library) {}
  void* library_;
};

}  // namespace pyint8
