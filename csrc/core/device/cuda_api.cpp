#include "device/cuda_api.hpp"

#include <dlfcn.h>

#include "error.hpp"

namespace pyint8 {

std::shared_ptr<const CudaApi> CudaApi::open(const std::string& library) {
  void* handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = ::dlerror();
    throw Error(ErrorCode::kDriver,
                "the NVIDIA driver library cannot be opened: " + std::string(reason ? reason : library));
  }
  std::shared_ptr<CudaApi> api(new CudaApi(handle));
#define PYINT8_RESOLVE(member, symbol, parameters)                                 \
  api->member = reinterpret_cast<CuResult(*) parameters>(::dlsym(handle, symbol)); \
  if (api->member == nullptr) {                                                    \
    throw Error(ErrorCode::kDriver, library + " has no " symbol                    \
                                              "; a driver of CUDA 12.0 (525) "     \
                                              "or newer is needed");               \
  }
  PYINT8_CUDA_ENTRY_POINTS(PYINT8_RESOLVE)
#undef PYINT8_RESOLVE
  api->check(api->init(0), "cuInit");
  return api;
}

CudaApi::~CudaApi() {
  ::dlclose(library_);
}

void CudaApi::check(CuResult result, const char* what) const {
  if (result == 0) return;
  const char* name = nullptr;
  const char* text = nullptr;
  get_error_name(result, &name);
  get_error_string(result, &text);
  throw Error(ErrorCode::kDriver, std::string(what) + ": " + (name ? name : std::to_string(result)) + ", " +
                                      (text ? text : "unknown error"));
}

}  // namespace pyint8
