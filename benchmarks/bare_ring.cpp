// What the simplest ring moves from the page cache to GPUs: a ceiling for the engine, which does more than
// this (any ranges, an order, tickets, priorities, errors that say where).
//
//   bare_ring LIBCUDA GPUS THREADS SLOTS SLOT_BYTES PASSES FILE...
//
// Threads are dealt to the GPUs in turn. Each has pinned slots, a stream and events of its own, takes the
// next piece of the files, reads it into a slot and sends it off. Prints the bytes of a pass and the seconds
// of each as JSON; setting up is not counted.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "device/device_cuda.hpp"
#include "device/kernel_images.hpp"
#include "error.hpp"
#include "storage/file.hpp"

namespace pyint8 {

std::span<const KernelImage> kernel_images() {
  return {};  // none is launched here
}

namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string library;
  std::size_t gpus, threads, slots, slot_bytes, passes;
  std::vector<std::string> files;
};

struct Piece {
  const File* file;
  std::uint64_t offset;
  std::size_t nbytes;
};

// Memory of a GPU, which the engine never allocates itself: so its driver interface has no such calls.
class DeviceMemory {
 public:
  DeviceMemory(const Options& options, const CudaContext& context, std::size_t nbytes)
      : context_(context), library_(::dlopen(options.library.c_str(), RTLD_NOW)) {
    const CudaContext::Scope scope(context_);
    using Allocate = CuResult (*)(CuDevicePtr*, std::size_t);
    context_.api().check(reinterpret_cast<Allocate>(::dlsym(library_, "cuMemAlloc_v2"))(&data_, nbytes),
                         "cuMemAlloc");
  }
  ~DeviceMemory() {
    const CudaContext::Scope scope(context_, std::nothrow);
    reinterpret_cast<CuResult (*)(CuDevicePtr)>(::dlsym(library_, "cuMemFree_v2"))(data_);
    ::dlclose(library_);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  Address data() const { return data_; }

 private:
  const CudaContext& context_;
  void* library_;
  CuDevicePtr data_ = 0;
};

// One thread's ring: slots on the host, a place for each on the GPU, and a device object, so a copy stream,
// of its own.
class Ring {
 public:
  Ring(const Options& options, const std::shared_ptr<const CudaApi>& api, int gpu)
      : slot_bytes_(options.slot_bytes),
        context_(api, gpu),
        device_(api, gpu),
        slots_(device_.allocate_host(options.slots * slot_bytes_)),
        target_(options, context_, options.slots * slot_bytes_) {
    std::generate_n(std::back_inserter(emptied_), options.slots, [this] { return device_.make_event(); });
  }

  void move(const Piece& piece) {
    const std::size_t at = next_ * slot_bytes_;
    Event& emptied = *emptied_[next_];
    while (!emptied.passed()) std::this_thread::yield();
    piece.file->read_at(slots_->data() + at, piece.nbytes, piece.nbytes, piece.offset);
    device_.copy(target_.data() + at, slots_->data() + at, piece.nbytes);
    device_.record(emptied);
    next_ = (next_ + 1) % emptied_.size();
  }
  void synchronize() { device_.synchronize(); }

 private:
  std::size_t slot_bytes_;
  CudaContext context_;
  CudaDevice device_;
  std::unique_ptr<HostMemory> slots_;
  DeviceMemory target_;
  std::vector<std::unique_ptr<Event>> emptied_;
  std::size_t next_ = 0;
};

std::vector<Piece> cut(const std::deque<File>& files, std::size_t slot_bytes) {
  std::vector<Piece> pieces;
  for (const File& file : files) {
    const std::uint64_t size = std::filesystem::file_size(file.path());
    for (std::uint64_t offset = 0; offset < size; offset += slot_bytes) {
      pieces.push_back({&file, offset, std::min<std::size_t>(slot_bytes, size - offset)});
    }
  }
  return pieces;
}

// Moves all pieces; returns the seconds.
double pass(std::deque<Ring>& rings, const std::vector<Piece>& pieces) {
  const Clock::time_point start = Clock::now();
  std::atomic<std::size_t> next{0};
  std::vector<std::jthread> threads;
  for (Ring& ring : rings) {
    threads.emplace_back([&] {
      for (std::size_t i = next++; i < pieces.size(); i = next++) ring.move(pieces[i]);
      ring.synchronize();
    });
  }
  threads.clear();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void run(const Options& options) {
  const auto api = CudaApi::open(options.library);
  std::deque<File> files;
  for (const std::string& path : options.files) files.emplace_back(path, false);
  const std::vector<Piece> pieces = cut(files, options.slot_bytes);
  std::deque<Ring> rings;
  for (std::size_t i = 0; i < options.threads; ++i)
    rings.emplace_back(options, api, static_cast<int>(i % options.gpus));
  std::size_t nbytes = 0;
  for (const Piece& piece : pieces) nbytes += piece.nbytes;
  std::printf("{\"bytes\": %zu, \"seconds\": [", nbytes);
  for (std::size_t i = 0; i < options.passes; ++i)
    std::printf("%s%.6f", i == 0 ? "" : ", ", pass(rings, pieces));
  std::printf("]}\n");
}

}  // namespace
}  // namespace pyint8

int main(int count, char** arguments) {
  const std::vector<std::string> given(arguments + 1, arguments + count);
  if (given.size() < 7) {
    std::fprintf(stderr, "usage: bare_ring LIBCUDA GPUS THREADS SLOTS SLOT_BYTES PASSES FILE...\n");
    return 2;
  }
  const auto number = [&](std::size_t i) { return std::stoul(given[i]); };
  try {
    pyint8::run(
        {given[0], number(1), number(2), number(3), number(4), number(5), {given.begin() + 6, given.end()}});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bare_ring: %s\n", error.what());
    return 1;
  }
}
