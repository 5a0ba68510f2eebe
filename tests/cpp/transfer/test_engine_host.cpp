#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "device/device_host.hpp"
#include "engine_support.hpp"

namespace pyint8::testing {
namespace {

std::vector<Read> one_read(std::uint32_t file, std::uint64_t offset, Bytes& to) {
  return {{{file, offset, to.size()}, reinterpret_cast<Address>(to.data())}};
}

// Gives a byte for each offset, once it is let to.
class Slow final : public Source {
 public:
  void read_at(std::byte* out, std::size_t needed, std::size_t, std::uint64_t offset) const override {
    begun = true;
    while (!open && !cancelled) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (cancelled) throw Error(ErrorCode::kCancelled, "so it was");
    for (std::size_t i = 0; i < needed; ++i) out[i] = static_cast<std::byte>(offset + i);
  }
  void require_unchanged() const override {}
  void cancel() const noexcept override { cancelled = true; }

  std::atomic<bool> open = false;
  mutable std::atomic<bool> begun = false;
  mutable std::atomic<bool> cancelled = false;
};

}  // namespace

TEST_CASE("what is no file is read as one is, and numbered with them") {
  const Checkpoint checkpoint({1000});
  Bytes bytes(300);
  Engine engine({});
  engine.add_device(std::make_unique<HostDevice>(1));
  checkpoint.open(engine);
  const auto source = std::make_shared<Slow>();
  source->open = true;
  CHECK(engine.add_source(source) == 1);
  wait_for(engine, engine.submit(0, one_read(1, 7, bytes), 0, false), 0);
  for (std::size_t i = 0; i < bytes.size(); ++i) REQUIRE(bytes[i] == static_cast<std::byte>(7 + i));
  engine.close();
  CHECK(source->cancelled);
}

TEST_CASE("closing cancels reads under way, and waits for their end") {
  Bytes bytes(300);
  Engine engine({});
  engine.add_device(std::make_unique<HostDevice>(1));
  const auto source = std::make_shared<Slow>();
  const std::uint32_t file = engine.add_source(source);
  const Ticket ticket = engine.submit(0, one_read(file, 0, bytes), 0, false);
  while (!source->begun) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  engine.close();
  CHECK_THROWS_AS(engine.wait(ticket, 0, std::chrono::milliseconds(0)), Error);
}

TEST_CASE("every read is byte-exact, whatever the threads, slots and reads") {
  const Checkpoint checkpoint({200001, 77777, 4096, 1});
  Random random(1);
  for (const std::size_t threads : {1, 2, 5}) {
    for (const std::size_t slot_bytes : {8192, 20480, 1 << 20}) {
      for (const bool direct_io : {false, true}) {
        std::deque<Reads> batches;
        Engine engine({.threads = threads, .slot_bytes = slot_bytes, .direct_io = direct_io});
        engine.add_device(std::make_unique<HostDevice>(threads));
        checkpoint.open(engine);
        std::size_t delivered = 0;
        for (int batch = 0; batch < 10; ++batch) {
          const Reads& reads = batches.emplace_back(checkpoint, random, pick(random, 0, 60), 50000);
          const Ticket ticket = engine.submit(0, reads.all(), 0, pick(random, 0, 1) == 1);
          for (std::size_t i = 0; i < reads.all().size(); ++i) {
            wait_for(engine, ticket + i, 0);
            REQUIRE(reads.arrived(i));
          }
          REQUIRE(reads.arrived());
          delivered += reads.nbytes();
        }
        const Stats stats = engine.stats();
        CHECK(stats.bytes_delivered == delivered);
        CHECK(stats.bytes_read == delivered);  // no slot between: no gap is read
        CHECK(stats.slot_seconds == 0);
        CHECK(stats.read_seconds > 0);
      }
    }
  }
}

TEST_CASE("tickets count up from 0, over submissions and empty ones") {
  const Checkpoint checkpoint({1000});
  Bytes a(10), b(20);
  Engine engine({});
  engine.add_device(std::make_unique<HostDevice>(1));
  checkpoint.open(engine);
  CHECK(engine.submit(0, {}, 0, false) == 0);
  CHECK(engine.submit(0, one_read(0, 0, a), 0, false) == 0);
  CHECK(engine.submit(0, one_read(0, 5, b), 0, false) == 1);
  CHECK(engine.submit(0, {}, 0, false) == 2);
  wait_for(engine, 1, 0);
  wait_for(engine, 0, 0);
}

TEST_CASE("files in another state than they were, or should be in") {
  const Checkpoint checkpoint({1000, 2000});
  const std::string& path = checkpoint.files[1].path();
  struct stat status{};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  FileStamp stamp{status.st_dev, status.st_ino, status.st_size,
                  status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
  Engine engine({});
  CHECK(engine.add_file(checkpoint.files[0].path()) == 0);
  CHECK(engine.add_file(path, stamp) == 1);
  CHECK_NOTHROW(engine.require_unchanged());
  ++stamp.size;
  CHECK(error_of([&] { engine.add_file(path, stamp); }).code() == ErrorCode::kChanged);
  CHECK_NOTHROW(engine.require_unchanged());
  REQUIRE(::truncate(path.c_str(), 3) == 0);
  const Error error = error_of([&] { engine.require_unchanged(); });
  CHECK(error.code() == ErrorCode::kChanged);
  CHECK(error.path() == path);
}

TEST_CASE("lanes, files and tickets that do not exist, and a ticket waited for twice") {
  const Checkpoint checkpoint({1000});
  Bytes bytes(10), empty;
  Engine engine({});
  const auto refused = [&](const std::string& words, const std::function<void()>& action) {
    const Error error = error_of(action);
    CHECK(error.code() == ErrorCode::kInvalidArgument);
    CHECK(error.message() == words);
  };
  refused("there is no lane 0", [&] { engine.submit(0, {}, 0, false); });
  CHECK(engine.add_device(std::make_unique<HostDevice>(1)) == 0);
  CHECK(engine.add_device(std::make_unique<HostDevice>(1)) == 1);
  refused("there is no file 0", [&] { engine.submit(0, one_read(0, 0, bytes), 0, false); });
  CHECK(engine.add_file(checkpoint.files[0].path()) == 0);
  CHECK(engine.add_file(checkpoint.files[0].path()) == 1);
  refused("there is no ticket 0", [&] { engine.wait(0, 0, kPatience); });
  refused("there is no lane 2", [&] { engine.transpose_to_half(2, {}, 0); });
  engine.submit(0, one_read(1, 0, bytes), 0, false);
  engine.submit(1, one_read(1, 0, empty), 0, false);
  for (const Ticket ticket : {0, 1}) {
    wait_for(engine, ticket, 0);
    refused("ticket " + std::to_string(ticket) + " was waited for before",
            [&] { engine.wait(ticket, 0, kPatience); });
  }
  const Read impossible = {{0, ~std::uint64_t{0}, 10}, 0};
  CHECK(contains(error_of([&] { engine.submit(0, {&impossible, 1}, 0, false); }).message(), "beyond 2^63"));
}

TEST_CASE("a promised ticket is waited for until it is kept, and is kept once") {
  const Checkpoint checkpoint({1000});
  Bytes bytes(10);
  Engine engine({});
  CHECK(error_of([&] { engine.promise(0, 1); }).code() == ErrorCode::kInvalidArgument);
  engine.add_device(std::make_unique<HostDevice>(1));
  checkpoint.open(engine);
  CHECK(engine.promise(0, 2) == 0);
  CHECK(engine.submit(0, one_read(0, 0, bytes), 0, false) == 2);
  CHECK(engine.is_on_its_way(2, kPatience));
  for (const Ticket ticket : {0, 1}) CHECK_FALSE(engine.is_on_its_way(ticket, std::chrono::milliseconds(0)));
  CHECK_FALSE(engine.wait(1, 0, std::chrono::milliseconds(1)));

  std::thread keeper([&] { engine.keep_promise(0, 2, 0); });
  for (const Ticket ticket : {1, 0}) wait_for(engine, ticket, 0);
  keeper.join();
  for (const Ticket ticket : {1, 2}) {
    const Error error = error_of([&] { engine.keep_promise(ticket, 1, 0); });
    CHECK(error.message() == "ticket " + std::to_string(ticket) + " is not a promise");
  }
  CHECK(contains(error_of([&] { engine.keep_promise(2, 2, 0); }).message(), "there is no ticket 3"));
}

TEST_CASE("several tickets are waited for at once, and none of them as long as one is missing") {
  const Checkpoint checkpoint({1000});
  Bytes bytes(10);
  Engine engine({});
  engine.add_device(std::make_unique<HostDevice>(1));
  checkpoint.open(engine);
  CHECK(engine.promise(0, 1) == 0);
  CHECK(engine.submit(0, one_read(0, 0, bytes), 0, false) == 1);
  CHECK(engine.wait_all({}, 0, std::chrono::milliseconds(0)));
  CHECK(engine.is_on_its_way(1, kPatience));
  const std::vector<Ticket> both = {1, 0};
  CHECK_FALSE(engine.wait_all(both, 0, std::chrono::milliseconds(1)));
  std::thread keeper([&] { engine.keep_promise(0, 1, 0); });
  CHECK(engine.wait_all(both, 0, kPatience));
  keeper.join();
  CHECK(contains(error_of([&] { engine.wait_all(both, 0, kPatience); }).message(), "was waited for before"));
  engine.close();
  CHECK(error_of([&] { engine.wait_all(both, 0, kPatience); }).code() == ErrorCode::kCancelled);
}

TEST_CASE("a promise that is not kept ends with the engine") {
  Engine engine({});
  engine.add_device(std::make_unique<HostDevice>(1));
  engine.promise(0, 1);
  std::thread closer([&] { engine.close(); });
  CHECK(error_of([&] { wait_for(engine, 0, 0); }).code() == ErrorCode::kCancelled);
  closer.join();
  CHECK(error_of([&] { engine.keep_promise(0, 1, 0); }).code() == ErrorCode::kCancelled);
  CHECK(error_of([&] { engine.promise(0, 1); }).code() == ErrorCode::kCancelled);
  CHECK(error_of([&] { engine.is_on_its_way(0, kPatience); }).code() == ErrorCode::kCancelled);
}

TEST_CASE("options are validated before anything is made") {
  const std::size_t before = running_threads();
  CHECK(error_of([] { Engine({.threads = 0}); }).code() == ErrorCode::kInvalidArgument);
  CHECK(threads_become(before));
}

TEST_CASE("a file that cannot be opened") {
  Engine engine({});
  const Error error = error_of([&] { engine.add_file("/nowhere"); });
  CHECK(error.code() == ErrorCode::kIo);
  CHECK(error.path() == "/nowhere");
}

TEST_CASE("a worker's error reaches every wait; what had arrived before stays arrived") {
  const Checkpoint checkpoint({1000});
  Bytes good(1000), bad(100), never(10);
  Engine engine({.threads = 2});
  engine.add_device(std::make_unique<HostDevice>(1));
  checkpoint.open(engine);
  const Ticket first = engine.submit(0, one_read(0, 0, good), 0, false);
  while (engine.stats().pieces == 0) std::this_thread::yield();
  engine.submit(0, one_read(0, 950, bad), 0, false);
  for (int i = 0; i < 2; ++i) {
    const Error error = error_of([&] { engine.wait(1, 0, kPatience); });
    CHECK(error.code() == ErrorCode::kTruncated);
    CHECK(error.path() == checkpoint.files[0].path());
    CHECK(error.offset() == 1000);
  }
  const Ticket late = engine.submit(0, one_read(0, 0, never), 0, false);
  CHECK(error_of([&] { engine.wait(late, 0, kPatience); }).code() == ErrorCode::kTruncated);
  wait_for(engine, first, 0);
  CHECK(good == checkpoint.contents[0]);
}

TEST_CASE("close ends everything: waits, threads, descriptors; and may be called again") {
  const Checkpoint checkpoint({1 << 20});
  const std::size_t threads = running_threads();
  const std::size_t files = open_files();
  Bytes to(1 << 20);
  Engine engine({.direct_io = true});
  engine.add_device(std::make_unique<HostDevice>(1));
  checkpoint.open(engine);
  for (int i = 0; i < 5000; ++i) engine.submit(0, one_read(0, 0, to), 0, false);  // a second or more
  std::atomic<bool> cancelled = false;
  std::thread waiter([&] {
    try {
      engine.wait(4999, 0, kPatience);
    } catch (const Error& error) {
      cancelled = error.code() == ErrorCode::kCancelled;
    }
  });
  wait_for(engine, 0, 0);
  engine.close();
  waiter.join();
  CHECK(cancelled);
  std::fill(to.begin(), to.end(), std::byte{1});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(to == Bytes(1 << 20, std::byte{1}));
  engine.close();
  CHECK(threads_become(threads));
  CHECK(open_files() == files);
  CHECK(error_of([&] { engine.submit(0, one_read(0, 0, to), 0, false); }).code() == ErrorCode::kCancelled);
  CHECK(error_of([&] { engine.wait(0, 0, kPatience); }).code() == ErrorCode::kCancelled);
}

TEST_CASE("a wait gives up when its time is over, and may be taken up again") {
  const Checkpoint checkpoint({8 << 20});
  std::vector<Bytes> destinations(8, Bytes(8 << 20));
  Engine engine({.slot_bytes = 8 << 20});
  engine.add_device(std::make_unique<HostDevice>(1));
  checkpoint.open(engine);
  for (Bytes& to : destinations) engine.submit(0, one_read(0, 0, to), 0, false);
  CHECK_FALSE(engine.wait(7, 0, std::chrono::milliseconds(0)));
  wait_for(engine, 7, 0);
  CHECK(destinations[7] == checkpoint.contents[0]);
}

TEST_CASE("a weight is transposed on the lane") {
  Engine engine({});
  engine.add_device(std::make_unique<HostDevice>(2));
  const std::vector<std::uint16_t> from = {1, 2, 3, 4, 5, 6};
  std::vector<std::uint16_t> to(6);
  engine.transpose_to_half(0,
                           {reinterpret_cast<Address>(from.data()), ElementType::kHalf, false, 2, 3,
                            reinterpret_cast<Address>(to.data()), 2},
                           0);
  CHECK(to == std::vector<std::uint16_t>{1, 4, 2, 5, 3, 6});
}

}  // namespace pyint8::testing
