#include <dlfcn.h>

#include "cuda_support.hpp"
#include "device/cuda_api.hpp"

namespace pyint8::testing {

TEST_CASE("a machine without a driver") {
  const Error error = error_of([] { CudaApi::open("libcuda-that-is-nowhere.so.1"); });
  CHECK(error.code() == ErrorCode::kDriver);
  CHECK(contains(error.message(), "the NVIDIA driver library cannot be opened"));
  CHECK(contains(error.message(), "libcuda-that-is-nowhere.so.1"));
}

TEST_CASE("a library that is no driver, or an old one") {
  const Error error = error_of([] { CudaApi::open("libm.so.6"); });
  CHECK(error.code() == ErrorCode::kDriver);
  CHECK(error.message() == "libm.so.6 has no cuInit; a driver of CUDA 12.0 (525) or newer is needed");
}

TEST_CASE("a library that was refused is closed again") {
  const char* library = "libresolv.so.2";
  if (::dlopen(library, RTLD_NOW | RTLD_NOLOAD) != nullptr) return;  // somebody else has it
  CHECK(contains(error_of([&] { CudaApi::open(library); }).message(), "libresolv.so.2 has no cuInit"));
  CHECK(::dlopen(library, RTLD_NOW | RTLD_NOLOAD) == nullptr);
}

TEST_CASE("a driver without a device says so in its own words") {
  const Accounts accounts;
  fake_cuda_fail_after("cuInit", 1, 100);
  const Error error = error_of([] { fake_driver(); });
  CHECK(error.code() == ErrorCode::kDriver);
  CHECK(error.message() == "cuInit: CUDA_ERROR_NO_DEVICE, said the fake driver");
}

TEST_CASE("every entry point is found, and the driver initialised once for each opening") {
  const Accounts accounts;
  const auto api = fake_driver();
#define PYINT8_FOUND(member, symbol, parameters) CHECK((api->member != nullptr));
  PYINT8_CUDA_ENTRY_POINTS(PYINT8_FOUND)
#undef PYINT8_FOUND
  CHECK(fake_cuda_calls("cuInit") == 1);
}

TEST_CASE("check() lets success pass, and names what even the driver does not know") {
  const auto api = fake_driver();
  api->check(0, "anything");
  CHECK(error_of([&] { api->check(2, "cuThing"); }).message() ==
        "cuThing: CUDA_ERROR_OUT_OF_MEMORY, said the fake driver");
  CHECK(error_of([&] { api->check(123456, "cuThing"); }).message() == "cuThing: 123456, unknown error");
}

}  // namespace pyint8::testing
