#include <atomic>
#include <chrono>
#include <optional>
#include <thread>

#include "support.hpp"
#include "transfer/ring.hpp"

namespace pyint8::testing {
namespace {

// A device whose events pass when the test says so.
class SpyDevice final : public Device {
 public:
  class SpyEvent final : public Event {
   public:
    explicit SpyEvent(SpyDevice& device) : device_(device) {}
    bool passed() override {
      if (device_.fails) throw Error(ErrorCode::kDriver, "lost");
      return device_.passed;
    }

   private:
    SpyDevice& device_;
  };

  bool reads_in_place() const override { return false; }
  std::unique_ptr<HostMemory> allocate_host(std::size_t) override { return nullptr; }
  std::unique_ptr<Event> make_event() override {
    ++events;
    return std::make_unique<SpyEvent>(*this);
  }
  void copy(Address, const std::byte*, std::size_t) override {}
  void record(Event& event) override {
    if (fails) throw Error(ErrorCode::kDriver, "lost");
    recorded = &event;
  }
  void copies_wait_for(const Event&) override {}
  void record_on(StreamHandle, Event&) override {}
  void stream_waits_for(StreamHandle, const Event&) override {}
  void synchronize() override {}
  std::unique_ptr<Stream> make_stream() override { return nullptr; }
  void prepare_kernels() override {}
  void transpose_to_half(const TransposeJob&, StreamHandle) override {}
  void copy_on_device(Address, Address, std::size_t, StreamHandle) override {}
  void cast(const CastJob&, StreamHandle) override {}
  void quantize(Quantizer, const QuantizeJob&, StreamHandle) override {}

  std::atomic<bool> passed = true;
  std::atomic<bool> fails = false;
  int events = 0;
  Event* recorded = nullptr;
};

struct RingOf {
  explicit RingOf(std::size_t slots) : bytes(slots * 100), ring(bytes.data(), 100, slots) {}

  Ring::Slot& lease() {
    emptied = ring.wait_for_empty();
    return ring.lease();
  }
  void send(Ring::Slot& slot, Device& device, std::size_t lane) {
    slot.mark(device, lane);
    ring.give_back(slot);
  }

  Bytes bytes;
  Ring ring;
  std::optional<std::size_t> emptied;
};

// Lets a device's copies pass in a while.
std::jthread passes_soon(SpyDevice& device) {
  device.passed = false;
  return std::jthread([&device] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    device.passed = true;
  });
}

}  // namespace

TEST_CASE("slots lie one behind the other, and come round in the order they were given back") {
  SpyDevice device;
  RingOf of(3);
  Ring::Slot& a = of.lease();
  Ring::Slot& b = of.lease();
  Ring::Slot& c = of.lease();
  CHECK(a.data() == of.bytes.data());
  CHECK(b.data() == a.data() + 100);
  CHECK(c.data() == b.data() + 100);
  for (Ring::Slot* slot : {&b, &c, &a}) of.ring.give_back(*slot);
  for (Ring::Slot* slot : {&b, &c, &a}) {
    CHECK(&of.lease() == slot);
    CHECK_FALSE(of.emptied);  // no copy was marked
  }
}

TEST_CASE("the copies out of a slot are awaited once, and it is said whose they were") {
  SpyDevice device;
  RingOf of(1);
  of.send(of.lease(), device, 7);
  const std::jthread bus = passes_soon(device);
  Ring::Slot& slot = of.lease();
  CHECK(device.passed);
  CHECK(of.emptied == 7);
  of.ring.give_back(slot);
  of.lease();
  CHECK_FALSE(of.emptied);
}

TEST_CASE("an empty slot that is not leased stays empty") {
  SpyDevice device;
  RingOf of(2);
  Ring::Slot& slot = of.lease();
  of.send(of.lease(), device, 3);
  of.send(slot, device, 4);
  CHECK(of.ring.wait_for_empty() == 3);
  CHECK_FALSE(of.ring.wait_for_empty());
  of.ring.lease();
  CHECK(of.ring.wait_for_empty() == 4);
  CHECK(&of.ring.lease() == &slot);
}

TEST_CASE("a slot that is empty already comes before an older one that is not") {
  SpyDevice slow, fast;
  RingOf of(2);
  Ring::Slot& older = of.lease();
  Ring::Slot& newer = of.lease();
  slow.passed = false;
  of.send(older, slow, 0);
  of.send(newer, fast, 1);
  CHECK(&of.lease() == &newer);
  CHECK(of.emptied == 1);
}

TEST_CASE("of several empty slots the one given back longest ago comes first") {
  SpyDevice device;
  RingOf of(2);
  Ring::Slot& first = of.lease();
  Ring::Slot& second = of.lease();
  of.send(second, device, 0);
  of.send(first, device, 0);
  const std::jthread bus = passes_soon(device);
  CHECK(&of.lease() == &second);
}

TEST_CASE("while none is empty, all are watched: a newer one may be the first") {
  SpyDevice stuck, slow;
  RingOf of(2);
  Ring::Slot& older = of.lease();
  Ring::Slot& newer = of.lease();
  stuck.passed = false;
  of.send(older, stuck, 0);
  of.send(newer, slow, 1);
  const std::jthread bus = passes_soon(slow);
  CHECK(&of.lease() == &newer);
  CHECK(of.emptied == 1);
}

TEST_CASE("a slot has one event on each lane, and waits for the one that was marked last") {
  SpyDevice first, second;
  RingOf of(1);
  Ring::Slot& slot = of.lease();
  slot.mark(first, 0);
  Event* const on_first = first.recorded;
  slot.mark(first, 0);
  CHECK(first.recorded == on_first);
  slot.mark(second, 2);
  CHECK(second.recorded != on_first);
  slot.mark(first, 0);
  CHECK(first.recorded == on_first);
  of.send(slot, second, 2);
  first.passed = false;
  of.lease();
  CHECK(of.emptied == 2);
  CHECK(first.events == 1);
  CHECK(second.events == 1);
}

TEST_CASE("copies whose end could not be marked are not said to be under way") {
  SpyDevice device;
  RingOf of(2);
  of.send(of.lease(), device, 0);
  Ring::Slot& slot = of.lease();
  CHECK(of.ring.under_way().size() == 1);
  device.fails = true;
  CHECK(error_of([&] { slot.mark(device, 0); }).code() == ErrorCode::kDriver);
  CHECK(of.ring.under_way().size() == 1);
}

TEST_CASE("a device that fails while a slot is awaited is an error of the wait") {
  SpyDevice device;
  RingOf of(1);
  of.send(of.lease(), device, 0);
  device.fails = true;
  CHECK(error_of([&] { of.ring.wait_for_empty(); }).code() == ErrorCode::kDriver);
}

}  // namespace pyint8::testing
