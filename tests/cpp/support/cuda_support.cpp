#include "cuda_support.hpp"

#include <array>
#include <thread>

namespace pyint8 {
namespace {

const std::array<KernelImage, 4> all_images = {
    {{90, "machine code 90"}, {80, "machine code 80"}, {75, "machine code 75"}, {0, "PTX"}}};
std::span<const KernelImage> images = all_images;

}  // namespace

// Comes before that of the build, which may have had no compiler for kernels.
std::span<const KernelImage> kernel_images() {
  return images;
}

}  // namespace pyint8

namespace pyint8::testing {
namespace {

void call(void* work) {
  const std::unique_ptr<std::function<void()>> owned(static_cast<std::function<void()>*>(work));
  (*owned)();
}

}  // namespace

std::shared_ptr<const CudaApi> fake_driver() {
  return CudaApi::open(FAKE_CUDA_LIBRARY);
}

OnlyKernelImages::OnlyKernelImages(std::span<const KernelImage> only) {
  images = only;
}

OnlyKernelImages::~OnlyKernelImages() {
  images = all_images;
}

void wait_until_passed(Event& event) {
  while (!event.passed()) std::this_thread::yield();
}

FakeCudaCounters counters() {
  FakeCudaCounters counters;
  fake_cuda_counters(&counters);
  return counters;
}

Accounts::Accounts() {
  fake_cuda_reset();
}

Accounts::~Accounts() {
  const FakeCudaCounters end = counters();
  fake_cuda_reset();
  if (ignored_) return;
  CHECK(end.contexts == 0);
  CHECK(end.streams == 0);
  CHECK(end.events == 0);
  CHECK(end.modules == 0);
  CHECK(end.registered_bytes == 0);
  CHECK(end.device_bytes == 0);
  CHECK(end.peer_accesses == 0);
  CHECK(end.pageable_copies == 0);
  CHECK(end.violations == 0);
  CHECK(pinned_bytes_in_use() == 0);
}

Caller::Caller(int ordinal) : context_(fake_driver(), ordinal) {
  const CudaContext::Scope scope(context_);
  context_.api().check(context_.api().stream_create(&stream_, kStreamNonBlocking), "the caller's stream");
}

Caller::~Caller() {
  const CudaContext::Scope scope(context_);
  context_.api().stream_synchronize(stream_);
  context_.api().stream_destroy(stream_);
}

void Caller::then(std::function<void()> work, bool on_default) {
  const CudaContext::Scope scope(context_);
  auto* stream = on_default ? nullptr : reinterpret_cast<CUstream_st*>(stream_);
  context_.api().check(cuLaunchHostFunc(stream, call, new std::function<void()>(std::move(work))), "work");
}

void Caller::synchronize(bool on_default) {
  const CudaContext::Scope scope(context_);
  context_.api().check(context_.api().stream_synchronize(on_default ? nullptr : stream_), "synchronize");
}

}  // namespace pyint8::testing
