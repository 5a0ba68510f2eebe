#include <algorithm>
#include <array>
#include <chrono>
#include <thread>

#include "cuda_support.hpp"

namespace pyint8::testing {
namespace {

Address address_of(const void* data) {
  return reinterpret_cast<Address>(data);
}

// A weight of random bits and its transpose: on the device, and from the CPU's road.
struct Weight {
  Weight(ElementType type, bool through_bfloat16, std::size_t rows, std::size_t columns, std::size_t stride)
      : source(random_bytes(rows * columns * size_of(type), 5)),
        transposed(columns * stride, 0xabcd),
        expected(transposed),
        job{address_of(source.data()),     type,  through_bfloat16, rows, columns,
            address_of(transposed.data()), stride} {
    TransposeJob on_cpu = job;
    on_cpu.to = address_of(expected.data());
    transpose_to_half(on_cpu, 1);
  }
  // The two differ at most in the bits of a NaN.
  bool is_transposed() const {
    const auto is_nan = [](std::uint16_t bits) { return (bits & 0x7fff) > 0x7c00; };
    for (std::size_t i = 0; i < transposed.size(); ++i) {
      if (transposed[i] != expected[i] && !(is_nan(transposed[i]) && is_nan(expected[i]))) return false;
    }
    return true;
  }

  Bytes source;
  std::vector<std::uint16_t> transposed, expected;
  TransposeJob job;
};

}  // namespace

TEST_CASE("a weight is transposed on the stream of the caller, behind what is there") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  for (const ElementType type : {ElementType::kHalf, ElementType::kBFloat16, ElementType::kFloat}) {
    for (const bool through_bfloat16 : {false, true}) {
      for (const auto& [rows, columns] : {std::pair{1, 1}, {32, 32}, {33, 31}, {100, 65}, {5, 1000}}) {
        const Weight weight(type, through_bfloat16, rows, columns, rows + 3);
        Bytes arriving = weight.source;
        std::fill(arriving.begin(), arriving.end(), std::byte{0});
        TransposeJob job = weight.job;
        job.from = address_of(arriving.data());
        caller.then([&] { std::copy(weight.source.begin(), weight.source.end(), arriving.begin()); });
        device.transpose_to_half(job, caller.stream());
        caller.synchronize();
        REQUIRE(weight.is_transposed());
      }
    }
  }
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 1);
}

TEST_CASE("more rows than a grid has blocks for") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  const Weight weight(ElementType::kHalf, false, 65535 * 32 + 100, 1, 65535 * 32 + 100);
  device.transpose_to_half(weight.job, caller.stream());
  caller.synchronize();
  CHECK(weight.is_transposed());
}

TEST_CASE("an empty weight launches nothing; a bad one is refused before the driver sees it") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  device.transpose_to_half({0, ElementType::kHalf, false, 0, 7, 0, 0}, 0);
  device.transpose_to_half({0, ElementType::kHalf, false, 7, 0, 0, 7}, 0);
  CHECK(error_of([&] { device.transpose_to_half({0, ElementType::kHalf, false, 7, 7, 0, 6}, 0); }).code() ==
        ErrorCode::kInvalidArgument);
  CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 0);
  CHECK(fake_cuda_calls("cuLaunchKernel") == 0);
}

TEST_CASE("machine code of the device's major version is loaded, or else PTX") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);  // of compute capability 8.6; refuses other machine code than 8.0's
  Caller caller(0);
  const Weight weight(ElementType::kFloat, false, 3, 3, 3);
  SUBCASE("machine code") {
    device.transpose_to_half(weight.job, caller.stream());
    CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 1);
  }
  SUBCASE("there is none for this architecture") {
    const std::array<KernelImage, 3> others = {
        {{90, "machine code 90"}, {87, "machine code 87"}, {0, "PTX"}}};
    const OnlyKernelImages only(others);
    device.transpose_to_half(weight.job, caller.stream());
    CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 1);
  }
  SUBCASE("the driver does not take it") {
    fake_cuda_fail_after("cuModuleLoadDataEx", 1, 209);
    device.transpose_to_half(weight.job, caller.stream());
    CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 2);
  }
  caller.synchronize();
  CHECK(weight.is_transposed());
}

TEST_CASE("kernels that do not load are an error with the compiler's log, and may load the next time") {
  const Accounts accounts;
  const std::array<KernelImage, 1> ptx = {{{0, "PTX"}}};
  const OnlyKernelImages only(ptx);
  CudaDevice device(fake_driver(), 0);
  const Weight weight(ElementType::kFloat, false, 3, 3, 3);
  fake_cuda_fail_after("cuModuleLoadDataEx", 1, 218);
  const Error error = error_of([&] { device.transpose_to_half(weight.job, 0); });
  CHECK(error.code() == ErrorCode::kDriver);
  CHECK(contains(error.message(), "cuModuleLoadDataEx the fake compiler's log: CUDA_ERROR_INVALID_PTX"));
  fake_cuda_fail_after("cuModuleGetFunction", 1, 500);
  CHECK(
      contains(error_of([&] { device.transpose_to_half(weight.job, 0); }).message(), "cuModuleGetFunction"));
  fake_cuda_fail_after("cuLaunchKernel", 1, 719);
  CHECK(contains(error_of([&] { device.transpose_to_half(weight.job, 0); }).message(), "cuLaunchKernel"));
  Caller caller(0);
  device.transpose_to_half(weight.job, caller.stream());
  caller.synchronize();
  CHECK(weight.is_transposed());
}

TEST_CASE("a device that goes lets its kernels end before their code goes") {
  Accounts accounts;
  Caller caller(0);
  auto device = std::make_unique<CudaDevice>(fake_driver(), 0);
  const Weight weight(ElementType::kFloat, false, 3, 3, 3);
  Gate gate(caller);
  device->transpose_to_half(weight.job, caller.stream());
  std::jthread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    gate.open();
  });
  SUBCASE("asking works") {}
  SUBCASE("asking fails once: no context") {
    fake_cuda_fail_after("cuCtxPushCurrent_v2", 1, 2);
  }
  SUBCASE("asking fails once: an error of earlier work") {
    fake_cuda_fail_after("cuEventSynchronize", 1, 719);
  }
  SUBCASE("asking fails twice") {
    fake_cuda_fail_after("cuCtxPushCurrent_v2", 1, 2);
    fake_cuda_fail_after("cuEventSynchronize", 2, 719);
    device.reset();
    CHECK(counters().modules == 1);  // left behind: a kernel may still need it
    accounts.ignore();
  }
  device.reset();
  CHECK(counters().violations == 0);
  caller.synchronize();
  CHECK(weight.is_transposed());
}

TEST_CASE("a build without kernels says so") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  const OnlyKernelImages none({});
  const Weight weight(ElementType::kFloat, false, 3, 3, 3);
  const Error error = error_of([&] { device.transpose_to_half(weight.job, 0); });
  CHECK(error.message() == "this build has no GPU kernels");
}

}  // namespace pyint8::testing
