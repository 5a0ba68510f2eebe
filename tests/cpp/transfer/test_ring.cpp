#include <atomic>
#include <chrono>
#include <latch>
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
    void wait() override {
      ++device_.waits;
      device_.passed.wait(false);
      if (device_.fails) throw Error(ErrorCode::kDriver, "lost");
    }

   private:
    SpyDevice& device_;
  };
  class SpyMemory final : public HostMemory {
   public:
    SpyMemory(SpyDevice& device, std::size_t nbytes) : device_(device), bytes_(nbytes) { ++device_.memories; }
    ~SpyMemory() override { --device_.memories; }
    std::byte* data() override { return bytes_.data(); }

   private:
    SpyDevice& device_;
    Bytes bytes_;
  };

  bool reads_in_place() const override { return false; }
  std::unique_ptr<HostMemory> allocate_host(std::size_t nbytes) override {
    return std::make_unique<SpyMemory>(*this, nbytes);
  }
  std::unique_ptr<Event> make_event() override {
    ++events;
    return std::make_unique<SpyEvent>(*this);
  }
  void copy(Address, const std::byte*, std::size_t) override {}
  void record(Event&) override {}
  void copies_wait_for(const Event&) override {}
  void record_on(StreamHandle, Event&) override {}
  void stream_waits_for(StreamHandle, const Event&) override {}
  void synchronize() override {}
  void transpose_to_half(const TransposeJob&, StreamHandle) override {}

  std::atomic<bool> passed = true;
  std::atomic<bool> fails = false;
  std::atomic<int> waits = 0;
  int events = 0;
  int memories = 0;
};

void soon() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

}  // namespace

TEST_CASE("slots lie one behind the other, and come round in the order they were given back") {
  SpyDevice device;
  {
    Ring ring(device.allocate_host(3 * 100), 100, 3);
    Ring::Slot& a = ring.lease();
    Ring::Slot& b = ring.lease();
    Ring::Slot& c = ring.lease();
    CHECK(b.data() == a.data() + 100);
    CHECK(c.data() == b.data() + 100);
    ring.give_back(b);
    ring.give_back(c);
    ring.give_back(a);
    CHECK(&ring.lease() == &b);
    CHECK(&ring.lease() == &c);
    CHECK(&ring.lease() == &a);
    CHECK(device.waits == 0);  // no copy was marked
  }
  CHECK(device.memories == 0);
}

TEST_CASE("a lease waits for the copies out of the slot, once") {
  SpyDevice device;
  Ring ring(device.allocate_host(10), 10, 1);
  Ring::Slot& slot = ring.lease();
  slot.event_on(device);
  device.passed = false;
  ring.give_back(slot);
  std::atomic<bool> leased = false;
  std::thread other([&] {
    ring.lease();
    leased = true;
  });
  soon();
  CHECK_FALSE(leased);
  device.passed = true;
  device.passed.notify_all();
  other.join();
  CHECK(leased);
  ring.give_back(slot);
  ring.lease();
  CHECK(device.waits == 1);
}

TEST_CASE("a lease waits for a slot to be given back") {
  SpyDevice device;
  Ring ring(device.allocate_host(10), 10, 1);
  Ring::Slot& slot = ring.lease();
  std::atomic<bool> leased = false;
  std::thread other([&] {
    ring.give_back(ring.lease());
    leased = true;
  });
  soon();
  CHECK_FALSE(leased);
  ring.give_back(slot);
  other.join();
  CHECK(leased);
}

TEST_CASE("a slot has one event on each device, and waits for the one that was marked last") {
  SpyDevice first, second;
  Ring ring(first.allocate_host(10), 10, 1);
  Ring::Slot& slot = ring.lease();
  Event& on_first = slot.event_on(first);
  CHECK(&slot.event_on(first) == &on_first);
  Event& on_second = slot.event_on(second);
  CHECK(&on_second != &on_first);
  CHECK(&slot.event_on(first) == &on_first);
  slot.event_on(second);
  ring.give_back(slot);
  ring.lease();
  CHECK(first.events == 1);
  CHECK(second.events == 1);
  CHECK(first.waits == 0);
  CHECK(second.waits == 1);
}

TEST_CASE("a device that fails while a slot is awaited is an error of the lease") {
  SpyDevice device;
  Ring ring(device.allocate_host(10), 10, 1);
  Ring::Slot& slot = ring.lease();
  slot.event_on(device);
  ring.give_back(slot);
  device.fails = true;
  CHECK(error_of([&] { ring.lease(); }).code() == ErrorCode::kDriver);
}

TEST_CASE("no slot is ever leased twice at once") {
  SpyDevice device;
  constexpr std::size_t kSlots = 3;
  Ring ring(device.allocate_host(kSlots), 1, kSlots);
  std::atomic<int> collisions = 0;
  std::vector<std::jthread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        Ring::Slot& slot = ring.lease();
        if (*slot.data() != std::byte{0}) ++collisions;
        *slot.data() = std::byte{1};
        slot.event_on(device);
        *slot.data() = std::byte{0};
        ring.give_back(slot);
      }
    });
  }
  threads.clear();
  CHECK(collisions == 0);
}

}  // namespace pyint8::testing
