// Host memory as a device: nothing is asynchronous, so events have always passed and streams mean nothing.
#pragma once

#include "device/device.hpp"

namespace pyint8 {

class HostDevice : public Device {
 public:
  // `threads`: how many may transpose one weight.
  explicit HostDevice(std::size_t threads) : threads_(threads) {}

  bool reads_in_place() const override { return true; }
  std::unique_ptr<HostMemory> allocate_host(std::size_t nbytes) override;
  std::unique_ptr<Event> make_event() override;
  void copy(Address to, const std::byte* from, std::size_t nbytes) override;
  void record(Event&) override {}
  void copies_wait_for(const Event&) override {}
  void record_on(StreamHandle, Event&) override {}
  void stream_waits_for(StreamHandle, const Event&) override {}
  void synchronize() override {}
  std::unique_ptr<Stream> make_stream() override;
  void prepare_kernels() override {}
  void transpose_to_half(const TransposeJob& job, StreamHandle) override {
    pyint8::transpose_to_half(job, threads_);
  }
  void copy_on_device(Address to, Address from, std::size_t nbytes, StreamHandle) override {
    copy(to, reinterpret_cast<const std::byte*>(from), nbytes);
  }
  void cast(const CastJob& job, StreamHandle) override { pyint8::cast(job); }
  void quantize(Quantizer quantizer, const QuantizeJob& job, StreamHandle stream) override;

 private:
  std::size_t threads_;
};

// For bytes that are read only to be in the page cache: they are discarded with their slot.
class DiscardingDevice final : public HostDevice {
 public:
  DiscardingDevice() : HostDevice(1) {}
  bool reads_in_place() const override { return false; }
  void copy(Address, const std::byte*, std::size_t) override {}
};

}  // namespace pyint8
