// One CUDA device, through its driver: torch's primary context, a copy stream of our own.
#pragma once

#include <map>
#include <mutex>
#include <new>
#include <span>
#include <string>

#include "device/cuda_api.hpp"
#include "device/device.hpp"

namespace pyint8 {

// The driver's handle of a device's primary context, which torch uses too; kept alive while this is.
class CudaContext {
 public:
  CudaContext(std::shared_ptr<const CudaApi> api, int ordinal);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  const CudaApi& api() const { return *api_; }
  CuDevice device() const { return device_; }
  CuContext handle() const { return context_; }
  // 80 for 8.0.
  int compute_capability() const;

  // Makes the context current on this thread for as long as it lives.
  class Scope {
   public:
    explicit Scope(const CudaContext& context);
    // For destructors: where the driver is already shutting down, does nothing.
    Scope(const CudaContext& context, std::nothrow_t) noexcept;
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    // Whether it is current; else another may be.
    bool is_current() const { return pushed_; }

   private:
    const CudaApi& api_;
    bool pushed_;
  };

 private:
  std::shared_ptr<const CudaApi> api_;
  CuDevice device_ = 0;
  CuContext context_ = nullptr;
};

// What a context's own copy stream does.
class CudaCopies {
 public:
  explicit CudaCopies(std::shared_ptr<CudaContext> context);
  // Does not wait: see `end`.
  ~CudaCopies();
  CudaCopies(const CudaCopies&) = delete;
  CudaCopies& operator=(const CudaCopies&) = delete;

  CuStream stream() const { return stream_; }
  std::unique_ptr<Event> make_event() const;
  void copy(Address to, const std::byte* from, std::size_t nbytes) const;
  void record(Event& event) const;
  void wait_for(const Event& event) const;
  void synchronize() const;
  // Waits for all copies; false if it is not known whether they have ended.
  bool end() const noexcept;

 private:
  std::shared_ptr<CudaContext> context_;
  CuStream stream_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(std::shared_ptr<const CudaApi> api, int ordinal);
  ~CudaDevice() override;

  bool reads_in_place() const override { return false; }
  std::unique_ptr<HostMemory> allocate_host(std::size_t nbytes) override;
  std::unique_ptr<Event> make_event() override;
  std::unique_ptr<Event> make_timed_event() override;
  void copy(Address to, const std::byte* from, std::size_t nbytes) override;
  void record(Event& event) override;
  void copies_wait_for(const Event& event) override;
  void record_on(StreamHandle stream, Event& event) override;
  void stream_waits_for(StreamHandle stream, const Event& event) override;
  void synchronize() override;
  std::unique_ptr<Stream> make_stream() override;
  void prepare_kernels() override;
  void transpose_to_half(const TransposeJob& job, StreamHandle stream) override;
  void copy_on_device(Address to, Address from, std::size_t nbytes, StreamHandle stream) override;
  void cast(const CastJob& job, StreamHandle stream) override;
  void quantize(Quantizer quantizer, const QuantizeJob& job, StreamHandle stream) override;

 private:
  // Waits for all copies and kernels; false if it is not known whether they have ended.
  bool wait_for_all() noexcept;
  CuFunction kernel(const std::string& name);
  void launch(const std::string& kernel_name, unsigned blocks_x, unsigned blocks_y,
              std::span<void* const> arguments, StreamHandle stream);
  CuModule load_kernels() const;
  Event& last_on(StreamHandle stream);

  std::shared_ptr<CudaContext> context_;
  CudaCopies copies_;
  std::mutex module_mutex_;  // guards the two below
  CuModule module_ = nullptr;
  std::map<StreamHandle, std::unique_ptr<Event>> last_;  // kernel of each stream: the module outlives it
};

}  // namespace pyint8
