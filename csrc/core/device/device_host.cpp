#include "device/device_host.hpp"

#include <cstring>
#include <vector>

namespace pyint8 {
namespace {

class PassedEvent final : public Event {
 public:
  bool passed() override { return true; }
};

class PlainMemory final : public HostMemory {
 public:
  explicit PlainMemory(std::size_t nbytes) : bytes_(nbytes) {}
  std::byte* data() override { return bytes_.data(); }

 private:
  std::vector<std::byte> bytes_;
};

class NoStream final : public Stream {
 public:
  StreamHandle handle() const override { return 0; }
  void synchronize() override {}
};

}  // namespace

std::unique_ptr<HostMemory> HostDevice::allocate_host(std::size_t nbytes) {
  return std::make_unique<PlainMemory>(nbytes);
}

std::unique_ptr<Event> HostDevice::make_event() {
  return std::make_unique<PassedEvent>();
}

std::unique_ptr<Stream> HostDevice::make_stream() {
  return std::make_unique<NoStream>();
}

void HostDevice::quantize(Quantizer quantizer, const QuantizeJob& job, StreamHandle stream) {
  call(quantizer, job, stream);
}

void HostDevice::copy(Address to, const std::byte* from, std::size_t nbytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, nbytes);
}

}  // namespace pyint8
