#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "cuda_support.hpp"
#include "device/device_cuda.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kLarge = std::size_t{1} << 30;  // enough to be seen among all that is mapped

Address address_of(const void* data) {
  return reinterpret_cast<Address>(data);
}

void soon() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

constexpr std::size_t kPage = 4096;

bool is_mapped_in_child(void* page) {
  return exit_code_of_child([&] { return ::msync(page, kPage, MS_ASYNC) == 0 ? 1 : 0; }) == 1;
}

}  // namespace

TEST_CASE("a device holds one primary context and one stream, and leaves no context current") {
  const Accounts accounts;
  {
    const CudaDevice device(fake_driver(), 2);
    CHECK_FALSE(device.reads_in_place());
    CHECK(counters().contexts == 1);
    CHECK(counters().streams == 1);
    CHECK(fake_cuda_calls("cuCtxPushCurrent_v2") == fake_cuda_calls("cuCtxPopCurrent_v2"));
    CuContext current = nullptr;
    CHECK(fake_driver()->context_pop(&current) == 201);
    CHECK(fake_cuda_calls("cuModuleLoadDataEx") == 0);
  }
}

TEST_CASE("there is no such device") {
  const Accounts accounts;
  for (const int ordinal : {-1, 4}) {
    const Error error = error_of([&] { CudaDevice(fake_driver(), ordinal); });
    CHECK(error.code() == ErrorCode::kDriver);
    CHECK(contains(error.message(), "cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"));
  }
}

TEST_CASE("a device that could not be made leaves nothing behind") {
  for (const std::string entry_point :
       {"cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuStreamCreate"}) {
    CAPTURE(entry_point);
    const Accounts accounts;
    fake_cuda_fail_after(entry_point.c_str(), 1, 2);
    const std::string message = error_of([] { CudaDevice(fake_driver(), 0); }).message();
    CHECK(contains(message, ": CUDA_ERROR_OUT_OF_MEMORY"));
  }
}

TEST_CASE("host memory is pinned, counted, aligned to huge pages and given back") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  {
    const auto memory = device.allocate_host(12345);
    CHECK(counters().registered_bytes == 16384);  // in whole pages
    CHECK(pinned_bytes_in_use() == 12345);
    CHECK(address_of(memory->data()) % (2 << 20) == 0);
    std::memset(memory->data(), 1, 12345);
  }
  CHECK(counters().registered_bytes == 0);
  CHECK(pinned_bytes_in_use() == 0);
  const std::size_t mapped = mapped_bytes();
  device.allocate_host(kLarge).reset();
  CHECK(mapped_bytes() < mapped + kLarge / 2);
}

TEST_CASE("a forked child does not have the pinned memory, so that its pages stay this process's own") {
  void* probe = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(::madvise(probe, kPage, MADV_DONTFORK) == 0);
  const bool is_heeded = !is_mapped_in_child(probe);
  ::munmap(probe, kPage);
  if (!is_heeded) {
    MESSAGE("an emulator gives children all memory");
    return;
  }
  CudaDevice device(fake_driver(), 0);
  const auto memory = device.allocate_host(12345);
  CHECK_FALSE(is_mapped_in_child(memory->data()));
}

TEST_CASE("memory that could not be pinned is unmapped") {
  for (const std::string entry_point : {"cuMemHostRegister_v2", "cuCtxPushCurrent_v2"}) {
    CAPTURE(entry_point);
    const Accounts accounts;
    CudaDevice device(fake_driver(), 0);
    const std::size_t before = mapped_bytes();
    fake_cuda_fail_after(entry_point.c_str(), 1, 2);
    const Error error = error_of([&] { device.allocate_host(kLarge); });
    CHECK(error.code() == ErrorCode::kDriver);
    CHECK(mapped_bytes() < before + kLarge / 2);
    CHECK(pinned_bytes_in_use() == 0);
  }
}

TEST_CASE("more memory than there are addresses") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  const Error error = error_of([&] { device.allocate_host(std::size_t{1} << 48); });
  CHECK(error.code() == ErrorCode::kIo);
  CHECK(error.system_errno() == ENOMEM);
}

TEST_CASE("copies land in order behind what they wait for, and an event tells when") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  const auto memory = device.allocate_host(2);
  memory->data()[0] = std::byte{1};
  memory->data()[1] = std::byte{2};
  std::byte target{0};
  const auto ready = device.make_event();
  const auto landed = device.make_event();
  wait_until_passed(*landed);  // never recorded: passes

  Gate gate(caller);
  device.record_on(caller.stream(), *ready);
  device.copies_wait_for(*ready);
  device.copy(address_of(&target), memory->data(), 1);
  device.copy(address_of(&target), memory->data() + 1, 1);
  device.record(*landed);
  std::atomic<bool> passed = false;
  std::thread waiter([&] {
    wait_until_passed(*landed);
    passed = true;
  });
  soon();
  CHECK_FALSE(passed);
  gate.open();
  waiter.join();
  CHECK(target == std::byte{2});
  device.synchronize();
}

TEST_CASE("a device that goes lets its copies end first, even if asking for it fails once") {
  const Accounts accounts;
  std::byte target{0};
  Caller caller(0);
  auto device = std::make_unique<CudaDevice>(fake_driver(), 0);
  const auto memory = device->allocate_host(1);
  memory->data()[0] = std::byte{1};
  const auto ready = device->make_event();
  Gate gate(caller);
  device->record_on(caller.stream(), *ready);
  device->copies_wait_for(*ready);
  device->copy(address_of(&target), memory->data(), 1);
  std::jthread opener([&] {
    soon();
    gate.open();
  });
  SUBCASE("it does not fail") {}
  SUBCASE("no context") {
    fake_cuda_fail_after("cuCtxPushCurrent_v2", 1, 2);
  }
  SUBCASE("an error of earlier work") {
    fake_cuda_fail_after("cuStreamSynchronize", 1, 719);
  }
  device.reset();
  CHECK(target == std::byte{1});
}

TEST_CASE("a caller's stream waits for the moment that was recorded last before the call") {
  const Accounts accounts;
  Caller caller(1), other(1);
  CudaDevice device(fake_driver(), 1);
  const auto event = device.make_event();
  device.record(*event);
  device.stream_waits_for(caller.stream(), *event);
  Gate gate(other);
  device.record_on(other.stream(), *event);  // moves the event; the caller waits for the earlier moment
  caller.synchronize();
  gate.open();
  wait_until_passed(*event);
}

TEST_CASE("the default stream's handle is 0, and neither stream waits for the other by itself") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  const auto event = device.make_event();
  const auto latch = std::make_shared<std::latch>(1);
  caller.then([latch] { latch->wait(); }, true);
  device.record_on(0, *event);
  device.synchronize();
  device.copies_wait_for(*event);
  latch->count_down();
  device.synchronize();
  caller.synchronize(true);
}

TEST_CASE("an event is recorded only on streams of its own device") {
  const Accounts accounts;
  Caller elsewhere(1);
  CudaDevice device(fake_driver(), 0);
  const auto event = device.make_event();
  const Error error = error_of([&] { device.record_on(elsewhere.stream(), *event); });
  CHECK(error.message() == "cuEventRecord: CUDA_ERROR_INVALID_HANDLE, said the fake driver");
  device.record(*event);
  device.stream_waits_for(elsewhere.stream(), *event);  // but any stream may wait for it
  elsewhere.synchronize();
}

TEST_CASE("the fake sees memory taken back under a copy, and copies from pageable memory") {
  Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  auto memory = device.allocate_host(1);
  std::byte target{0}, pageable{3};
  Gate gate(caller);
  const auto event = device.make_event();
  device.record_on(caller.stream(), *event);
  device.copies_wait_for(*event);
  device.copy(address_of(&target), memory->data(), 1);
  device.copy(address_of(&target), &pageable, 1);
  CHECK(counters().pageable_copies == 1);
  CHECK(counters().violations == 0);
  std::thread opener([&] {
    soon();
    gate.open();
  });
  memory.reset();
  opener.join();
  device.synchronize();
  CHECK(counters().violations == 1);
  accounts.ignore();
}

}  // namespace pyint8::testing
