#include "device/device_cuda.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <string>

#include "device/kernel_images.hpp"
#include "device/kernel_tile.hpp"
#include "error.hpp"

namespace pyint8 {
namespace {

constexpr unsigned kMostBlocksY = 65535;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::atomic<std::size_t> pinned_bytes{0};

CuStream as_stream(StreamHandle handle) {
  return reinterpret_cast<CuStream>(handle);
}

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(std::shared_ptr<CudaContext> context, unsigned flags = kEventDisableTiming)
      : context_(std::move(context)) {
    const CudaContext::Scope scope(*context_);
    const CudaApi& api = context_->api();
    api.check(api.event_create(&handle_, flags), "cuEventCreate");
  }
  ~CudaEvent() override {
    const CudaContext::Scope scope(*context_, std::nothrow);
    context_->api().event_destroy(handle_);
  }
  bool passed() override {
    const CudaContext::Scope scope(*context_);
    const CuResult result = context_->api().event_query(handle_);
    if (result != kNotReady) context_->api().check(result, "cuEventQuery");
    return result != kNotReady;
  }
  double seconds_since(const Event& earlier) override {
    const CudaContext::Scope scope(*context_);
    float milliseconds = 0;
    context_->api().check(context_->api().event_elapsed_time(
                              &milliseconds, static_cast<const CudaEvent&>(earlier).handle_, handle_),
                          "cuEventElapsedTime");
    return milliseconds * 1e-3;
  }
  CuEvent handle() const { return handle_; }

 private:
  std::shared_ptr<CudaContext> context_;
  CuEvent handle_ = nullptr;
};

CuEvent handle_of(const Event& event) {
  return static_cast<const CudaEvent&>(event).handle();
}

// Huge pages first: the kernel then pins 512 times fewer pages, and registering takes milliseconds.
class PinnedMemory final : public HostMemory {
 public:
  PinnedMemory(std::shared_ptr<CudaContext> context, std::size_t nbytes)
      : context_(std::move(context)), mapped_(nbytes + kHugePage), nbytes_(nbytes) {
    const CudaContext::Scope scope(*context_);  // first: a failure after the mapping would have to undo it
    map_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) {
      throw Error::io("cannot allocate " + std::to_string(nbytes) + " bytes of host memory", errno, "", {});
    }
    const auto address = reinterpret_cast<std::uintptr_t>(map_);
    data_ = reinterpret_cast<std::byte*>((address + kHugePage - 1) / kHugePage * kHugePage);
    ::madvise(data_, nbytes, MADV_HUGEPAGE);
    // A fork would make the pages copy-on-write: the first write would give this process other pages than the
    // bus reads.
    ::madvise(map_, mapped_, MADV_DONTFORK);
    // The driver wants whole pages, which have 64 KiB on some aarch64.
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t whole = (nbytes + page - 1) / page * page;
    const CuResult result = context_->api().host_register(data_, whole, kHostRegisterPortable);
    if (result != 0) {
      ::munmap(map_, mapped_);
      context_->api().check(result, "cuMemHostRegister (is `ulimit -l` too small for the ring?)");
    }
    pinned_bytes += nbytes_;
  }
  ~PinnedMemory() override {
    const CudaContext::Scope scope(*context_, std::nothrow);
    // Pages that the driver did not release may still be read: leak them rather than reuse them.
    if (context_->api().host_unregister(data_) == 0) ::munmap(map_, mapped_);
    pinned_bytes -= nbytes_;
  }
  std::byte* data() override { return data_; }

 private:
  std::shared_ptr<CudaContext> context_;
  std::size_t mapped_;
  std::size_t nbytes_;
  void* map_ = nullptr;
  std::byte* data_ = nullptr;
};

class CudaStream final : public Stream {
 public:
  explicit CudaStream(std::shared_ptr<CudaContext> context) : context_(std::move(context)) {
    const CudaContext::Scope scope(*context_);
    const CudaApi& api = context_->api();
    api.check(api.stream_create(&handle_, kStreamNonBlocking), "cuStreamCreate");
  }
  ~CudaStream() override {
    const CudaContext::Scope scope(*context_, std::nothrow);
    context_->api().stream_destroy(handle_);
  }
  StreamHandle handle() const override { return reinterpret_cast<StreamHandle>(handle_); }
  void synchronize() override {
    const CudaContext::Scope scope(*context_);
    context_->api().check(context_->api().stream_synchronize(handle_), "cuStreamSynchronize");
  }

 private:
  std::shared_ptr<CudaContext> context_;
  CuStream handle_ = nullptr;
};

std::string name_of(ElementType type) {
  switch (type) {
    case ElementType::kHalf:
      return "half";
    case ElementType::kBFloat16:
      return "bfloat16";
    case ElementType::kFloat:
      return "float";
  }
  throw Error(ErrorCode::kInvalidArgument, "unknown element type " + std::to_string(static_cast<int>(type)));
}

// What is bfloat16 already need not be rounded to it.
std::string through(ElementType type, bool through_bfloat16) {
  return through_bfloat16 && type != ElementType::kBFloat16 ? "_through_bfloat16" : "";
}

std::string kernel_name(const TransposeJob& job) {
  return "transpose_" + name_of(job.type) + through(job.type, job.through_bfloat16);
}

std::string kernel_name(const CastJob& job) {
  return "cast_" + name_of(job.type) + "_to_" + name_of(job.to_type) +
         through(job.type, job.through_bfloat16);
}

}  // namespace

std::size_t pinned_bytes_in_use() {
  return pinned_bytes;
}

CudaContext::CudaContext(std::shared_ptr<const CudaApi> api, int ordinal) : api_(std::move(api)) {
  api_->check(api_->device_get(&device_, ordinal), "cuDeviceGet");
  api_->check(api_->primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

CudaContext::~CudaContext() {
  api_->primary_context_release(device_);
}

int CudaContext::compute_capability() const {
  int major = 0, minor = 0;
  api_->check(api_->device_get_attribute(&major, kComputeCapabilityMajor, device_), "cuDeviceGetAttribute");
  api_->check(api_->device_get_attribute(&minor, kComputeCapabilityMinor, device_), "cuDeviceGetAttribute");
  return 10 * major + minor;
}

CudaContext::Scope::Scope(const CudaContext& context) : api_(*context.api_), pushed_(true) {
  api_.check(api_.context_push(context.context_), "cuCtxPushCurrent");
}

CudaContext::Scope::Scope(const CudaContext& context, std::nothrow_t) noexcept
    : api_(*context.api_), pushed_(api_.context_push(context.context_) == 0) {}

CudaContext::Scope::~Scope() {
  if (!pushed_) return;
  CuContext popped = nullptr;
  api_.context_pop(&popped);
}

CudaCopies::CudaCopies(std::shared_ptr<CudaContext> context) : context_(std::move(context)) {
  const CudaContext::Scope scope(*context_);
  context_->api().check(context_->api().stream_create(&stream_, kStreamNonBlocking), "cuStreamCreate");
}

CudaCopies::~CudaCopies() {
  const CudaContext::Scope scope(*context_, std::nothrow);
  context_->api().stream_destroy(stream_);
}

std::unique_ptr<Event> CudaCopies::make_event() const {
  return std::make_unique<CudaEvent>(context_);
}

void CudaCopies::copy(Address to, const std::byte* from, std::size_t nbytes) const {
  const CudaContext::Scope scope(*context_);
  const CudaApi& api = context_->api();
  api.check(api.memcpy_to_device_async(to, from, nbytes, stream_), "cuMemcpyHtoDAsync");
}

void CudaCopies::record(Event& event) const {
  const CudaContext::Scope scope(*context_);
  context_->api().check(context_->api().event_record(handle_of(event), stream_), "cuEventRecord");
}

void CudaCopies::wait_for(const Event& event) const {
  const CudaContext::Scope scope(*context_);
  context_->api().check(context_->api().stream_wait_event(stream_, handle_of(event), 0), "cuStreamWaitEvent");
}

void CudaCopies::synchronize() const {
  const CudaContext::Scope scope(*context_);
  context_->api().check(context_->api().stream_synchronize(stream_), "cuStreamSynchronize");
}

bool CudaCopies::end() const noexcept {
  const CudaContext::Scope scope(*context_, std::nothrow);
  return context_->api().stream_synchronize(stream_) == 0;
}

CudaDevice::CudaDevice(std::shared_ptr<const CudaApi> api, int ordinal)
    : context_(std::make_shared<CudaContext>(std::move(api), ordinal)), copies_(context_) {}

CudaDevice::~CudaDevice() {
  // Twice: where asking itself failed, copies and kernels may still be under way.
  const bool has_ended = wait_for_all() || wait_for_all();
  const CudaContext::Scope scope(*context_, std::nothrow);
  // Kernels that may still run need their code: leak it rather than unload it.
  if (module_ != nullptr && has_ended) context_->api().module_unload(module_);
}

bool CudaDevice::wait_for_all() noexcept {
  const CudaContext::Scope scope(*context_, std::nothrow);
  const CudaApi& api = context_->api();
  const auto has_passed = [&](const auto& last) {
    return api.event_synchronize(handle_of(*last.second)) == 0;
  };
  return copies_.end() && std::all_of(last_.begin(), last_.end(), has_passed);
}

std::unique_ptr<HostMemory> CudaDevice::allocate_host(std::size_t nbytes) {
  return std::make_unique<PinnedMemory>(context_, nbytes);
}

std::unique_ptr<Event> CudaDevice::make_event() {
  return copies_.make_event();
}

std::unique_ptr<Event> CudaDevice::make_timed_event() {
  return std::make_unique<CudaEvent>(context_, kEventDefault);
}

void CudaDevice::copy(Address to, const std::byte* from, std::size_t nbytes) {
  copies_.copy(to, from, nbytes);
}

void CudaDevice::record(Event& event) {
  copies_.record(event);
}

void CudaDevice::copies_wait_for(const Event& event) {
  copies_.wait_for(event);
}

void CudaDevice::record_on(StreamHandle stream, Event& event) {
  const CudaContext::Scope scope(*context_);
  const CudaApi& api = context_->api();
  api.check(api.event_record(handle_of(event), as_stream(stream)), "cuEventRecord");
}

void CudaDevice::stream_waits_for(StreamHandle stream, const Event& event) {
  const CudaContext::Scope scope(*context_);
  const CudaApi& api = context_->api();
  api.check(api.stream_wait_event(as_stream(stream), handle_of(event), 0), "cuStreamWaitEvent");
}

void CudaDevice::synchronize() {
  copies_.synchronize();
}

// The machine code for this device, or else PTX, which the driver compiles.
CuModule CudaDevice::load_kernels() const {
  if (kernel_images().empty()) throw Error(ErrorCode::kDriver, "this build has no GPU kernels");
  const CudaApi& api = context_->api();
  const int own = context_->compute_capability();
  std::array<char, 4096> log{};
  std::array<int, 2> options = {kJitErrorLogBuffer, kJitErrorLogBufferSizeBytes};
  std::array<void*, 2> values = {log.data(), reinterpret_cast<void*>(log.size())};
  CuModule module = nullptr;
  CuResult result = 0;
  for (const KernelImage& image : kernel_images()) {
    const bool runs =
        image.architecture == 0 || (image.architecture / 10 == own / 10 && image.architecture <= own);
    if (!runs) continue;
    result = api.module_load(&module, image.data, options.size(), options.data(), values.data());
    if (result == 0) return module;
  }
  api.check(result, ("cuModuleLoadDataEx " + std::string(log.data())).c_str());
  return module;
}

// Loaded for the first weight that needs them, not before.
CuFunction CudaDevice::kernel(const std::string& name) {
  const CudaApi& api = context_->api();
  const std::lock_guard lock(module_mutex_);
  if (module_ == nullptr) module_ = load_kernels();
  CuFunction function = nullptr;
  api.check(api.module_get_function(&function, module_, name.c_str()), "cuModuleGetFunction");
  return function;
}

// Moves with each kernel that is put on the stream.
Event& CudaDevice::last_on(StreamHandle stream) {
  const std::lock_guard lock(module_mutex_);
  auto found = last_.find(stream);
  if (found == last_.end()) found = last_.emplace(stream, make_event()).first;
  return *found->second;
}

void CudaDevice::launch(const std::string& kernel_name, unsigned blocks_x, unsigned blocks_y,
                        std::span<void* const> arguments, StreamHandle stream) {
  const CuFunction function = kernel(kernel_name);
  Event& last = last_on(stream);  // first: what runs must be known
  const CudaApi& api = context_->api();
  api.check(api.launch_kernel(function, blocks_x, blocks_y, 1, kTile, kRows, 1, 0, as_stream(stream),
                              const_cast<void**>(arguments.data()), nullptr),
            "cuLaunchKernel");
  const CuResult result = api.event_record(handle_of(last), as_stream(stream));
  if (result != 0 && api.stream_synchronize(as_stream(stream)) != 0) {
    const std::lock_guard lock(module_mutex_);
    module_ = nullptr;  // the kernel's end cannot be waited for either: its code is left to the driver
  }
  api.check(result, "cuEventRecord");
}

std::unique_ptr<Stream> CudaDevice::make_stream() {
  return std::make_unique<CudaStream>(context_);
}

void CudaDevice::prepare_kernels() {
  const CudaContext::Scope scope(*context_);
  const std::lock_guard lock(module_mutex_);
  if (module_ == nullptr) module_ = load_kernels();
}

void CudaDevice::transpose_to_half(const TransposeJob& job, StreamHandle stream) {
  validate(job);
  if (job.rows == 0 || job.columns == 0) return;
  const CudaContext::Scope scope(*context_);
  auto [from, to] = std::pair<CuDevicePtr, CuDevicePtr>{job.from, job.to};
  unsigned long long rows = job.rows, columns = job.columns, to_stride = job.to_stride;
  const std::array<void*, 5> arguments = {&from, &rows, &columns, &to, &to_stride};
  const auto blocks_x = static_cast<unsigned>((job.columns + kTile - 1) / kTile);
  const auto blocks_y =
      static_cast<unsigned>(std::min<std::size_t>((job.rows + kTile - 1) / kTile, kMostBlocksY));
  launch(kernel_name(job), blocks_x, blocks_y, arguments, stream);
}

void CudaDevice::copy_on_device(Address to, Address from, std::size_t nbytes, StreamHandle stream) {
  const CudaContext::Scope scope(*context_);
  const CudaApi& api = context_->api();
  api.check(api.memcpy_on_device_async(to, from, nbytes, as_stream(stream)), "cuMemcpyDtoDAsync");
}

void CudaDevice::cast(const CastJob& job, StreamHandle stream) {
  validate(job);
  if (job.elements == 0) return;
  const CudaContext::Scope scope(*context_);
  auto [from, to, marks_at] = std::array<CuDevicePtr, 3>{job.from, job.to, job.marks_at};
  unsigned long long elements = job.elements, per_mark = job.elements_per_mark;
  unsigned long long overflow_only = job.marks == Marks::kOverflow ? 1 : 0;
  const std::array<void*, 6> arguments = {&from, &elements, &to, &marks_at, &per_mark, &overflow_only};
  const std::size_t blocks = (job.elements + kCastElements - 1) / kCastElements;
  launch(kernel_name(job), static_cast<unsigned>(blocks), 1, arguments, stream);
}

void CudaDevice::quantize(Quantizer quantizer, const QuantizeJob& job, StreamHandle stream) {
  const CudaContext::Scope scope(*context_);  // which bitsandbytes' runtime takes for its own
  call(quantizer, job, stream);
}

}  // namespace pyint8
