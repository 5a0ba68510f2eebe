#include <algorithm>
#include <atomic>
#include <deque>
#include <thread>

#include "cuda_support.hpp"
#include "device/device_host.hpp"
#include "engine_support.hpp"
#include "pread.hpp"
#include "storage/file.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kSlot = 8192;

Read read_of(std::uint64_t offset, Bytes& to) {
  return {{0, offset, to.size()}, reinterpret_cast<Address>(to.data())};
}

Bytes part(const Checkpoint& checkpoint, std::size_t offset, std::size_t nbytes) {
  const auto begin = checkpoint.contents[0].begin() + static_cast<std::ptrdiff_t>(offset);
  return {begin, begin + static_cast<std::ptrdiff_t>(nbytes)};
}

void add_lane(Engine& engine, int ordinal) {
  engine.add_device(std::make_unique<CudaDevice>(fake_driver(), ordinal));
}

void soon() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

// In each test destinations come before the callers and the engine, so that they outlive all that uses
// them.

// Submits random reads on random lanes, some ahead of others, then waits for all in a random order.
void pour(const Checkpoint& checkpoint, const EngineOptions& options, int lanes, Random& random) {
  std::deque<Reads> batches;
  std::deque<Caller> callers;
  Engine engine(options);
  checkpoint.open(engine);
  for (int lane = 0; lane < lanes; ++lane) {
    callers.emplace_back(lane);
    add_lane(engine, lane);
  }
  std::vector<std::pair<Ticket, Caller*>> tickets;
  std::size_t nbytes = 0;
  for (int batch = 0; batch < 10; ++batch) {
    const Reads& reads =
        batches.emplace_back(checkpoint, random, pick(random, 0, 25), 3 * options.slot_bytes);
    const auto lane = static_cast<std::uint32_t>(pick(random, 0, static_cast<std::size_t>(lanes) - 1));
    const Ticket first = engine.submit(lane, reads.all(), callers[lane].stream(), pick(random, 0, 1) == 1);
    for (std::size_t i = 0; i < reads.all().size(); ++i) tickets.emplace_back(first + i, &callers[lane]);
    nbytes += reads.nbytes();
  }
  std::shuffle(tickets.begin(), tickets.end(), random);
  for (const auto& [ticket, caller] : tickets) wait_for(engine, ticket, caller->stream());
  for (Caller& caller : callers) caller.synchronize();
  for (const Reads& reads : batches) REQUIRE(reads.arrived());
  CHECK(engine.stats().bytes_delivered == nbytes);
}

}  // namespace

TEST_CASE("every read is byte-exact, whatever the lanes, threads, slots and reads") {
  const Checkpoint checkpoint({200001, 77777, 4096, 1});
  Random random(1);
  for (const int lanes : {1, 3}) {
    for (const std::size_t threads : {1, 3}) {
      for (const std::size_t slots_per_thread : {1, 3}) {
        for (const std::size_t slot_bytes : {8192, 20480, 69632}) {
          for (const bool direct_io : {false, true}) {
            CAPTURE(lanes);
            CAPTURE(threads);
            CAPTURE(slots_per_thread);
            CAPTURE(slot_bytes);
            CAPTURE(direct_io);
            const Accounts accounts;
            pour(checkpoint, {threads, slots_per_thread, slot_bytes, direct_io}, lanes, random);
          }
        }
      }
    }
  }
}

TEST_CASE("small neighbours come with one read and leave no hole in each other") {
  const Accounts accounts;
  const Checkpoint checkpoint({100000});
  std::vector<Bytes> to(50, Bytes(100));
  Caller caller(0);
  Engine engine({.slot_bytes = 1 << 20});
  checkpoint.open(engine);
  add_lane(engine, 0);
  std::vector<Read> reads;
  for (std::size_t i = 0; i < to.size(); ++i) reads.push_back(read_of(i * 150, to[i]));
  const Ticket ticket = engine.submit(0, reads, caller.stream(), false);
  for (std::size_t i = 0; i < to.size(); ++i) wait_for(engine, ticket + i, caller.stream());
  caller.synchronize();
  for (std::size_t i = 0; i < to.size(); ++i) CHECK(to[i] == part(checkpoint, i * 150, 100));
  CHECK(engine.stats().pieces == 1);
  CHECK(engine.stats().bytes_read == 49 * 150 + 100);
  CHECK(engine.stats().bytes_delivered == 50 * 100);
}

TEST_CASE("with direct_io every read goes past the page cache, wherever it begins and ends") {
  const Accounts accounts;
  const Checkpoint checkpoint({10 * kSlot + 77});
  if (!File(checkpoint.files[0].path(), true).direct()) return;  // the file system cannot
  Bytes to(9 * kSlot + 13);
  Caller caller(0);
  Engine engine({.slot_bytes = kSlot, .direct_io = true});
  checkpoint.open(engine);
  add_lane(engine, 0);
  const std::size_t direct = direct_reads(), all = all_reads();
  const Read read = read_of(5, to);
  wait_for(engine, engine.submit(0, {&read, 1}, caller.stream(), false), caller.stream());
  caller.synchronize();
  CHECK(to == part(checkpoint, 5, to.size()));
  CHECK(direct_reads() - direct == all_reads() - all);
  CHECK(direct_reads() - direct == 10);
}

TEST_CASE("a destination is not written before what the caller's stream still does with it") {
  const Accounts accounts;
  const Checkpoint checkpoint({4 * kSlot});
  Bytes destination, seen;
  Caller caller(0);
  Engine engine({.threads = 2, .slot_bytes = kSlot});
  checkpoint.open(engine);
  add_lane(engine, 0);
  for (const bool first : {false, true}) {
    destination.assign(4 * kSlot, std::byte{1});
    caller.then([&] {
      soon();
      seen = destination;
    });
    const Read read = read_of(0, destination);
    wait_for(engine, engine.submit(0, {&read, 1}, caller.stream(), first), caller.stream());
    caller.synchronize();
    CHECK(seen == Bytes(4 * kSlot, std::byte{1}));
    CHECK(destination == checkpoint.contents[0]);
  }
}

TEST_CASE("after a wait the caller's stream, and it alone, waits for the bytes") {
  const Accounts accounts;
  const Checkpoint checkpoint({4 * kSlot});
  Bytes destination, seen;
  std::atomic<bool> read_it;
  Caller owner(0), reader(0), bystander(0);
  Engine engine({.threads = 2, .slot_bytes = kSlot});
  checkpoint.open(engine);
  add_lane(engine, 0);
  for (int i = 0; i < 20; ++i) {
    destination.assign(4 * kSlot, std::byte{1});
    read_it = false;
    Gate gate(owner);  // keeps the copies from starting
    const Read read = read_of(0, destination);
    wait_for(engine, engine.submit(0, {&read, 1}, owner.stream(), false), reader.stream());
    reader.then([&] {
      seen = destination;
      read_it = true;
    });
    bystander.synchronize();
    if (i == 0) soon();
    CHECK_FALSE(read_it);
    gate.open();
    reader.synchronize();
    CHECK(seen == checkpoint.contents[0]);
  }
}

TEST_CASE("who waits for a promised ticket waits for what its keeper's stream still does") {
  const Accounts accounts;
  std::atomic<bool> is_there = false, was_there = false;
  Caller keeper(0), reader(0);
  Engine engine({.slot_bytes = kSlot});
  add_lane(engine, 0);
  const Ticket ticket = engine.promise(0, 1);
  Gate gate(keeper);
  keeper.then([&] { is_there = true; });
  engine.keep_promise(ticket, 1, keeper.stream());
  wait_for(engine, ticket, reader.stream());
  reader.then([&] { was_there = is_there.load(); });
  soon();
  CHECK_FALSE(is_there);
  gate.open();
  reader.synchronize();
  CHECK(was_there);
}

TEST_CASE("the default stream is as good as any") {
  const Accounts accounts;
  const Checkpoint checkpoint({3 * kSlot});
  Bytes destination(3 * kSlot, std::byte{1}), before, after;
  Caller caller(0);
  Engine engine({.slot_bytes = kSlot});
  checkpoint.open(engine);
  add_lane(engine, 0);
  caller.then(
      [&] {
        soon();
        before = destination;
      },
      true);
  const Read read = read_of(0, destination);
  wait_for(engine, engine.submit(0, {&read, 1}, 0, false), 0);
  caller.then([&] { after = destination; }, true);
  caller.synchronize(true);
  CHECK(before == Bytes(3 * kSlot, std::byte{1}));
  CHECK(after == checkpoint.contents[0]);
}

TEST_CASE("reads submitted first overtake those that wait") {
  const Accounts accounts;
  const Checkpoint checkpoint({5 * kSlot});
  Caller caller(0);
  for (const bool first : {false, true}) {
    Bytes held(2 * kSlot), next(kSlot), contested(kSlot);
    Engine engine({.threads = 1, .slots_per_thread = 2, .slot_bytes = kSlot});
    checkpoint.open(engine);
    add_lane(engine, 0);
    Gate gate(caller);
    const auto submit = [&](std::uint64_t offset, Bytes& to, bool ahead) {
      const Read read = read_of(offset, to);
      return engine.submit(0, {&read, 1}, caller.stream(), ahead);
    };
    const Ticket filled = submit(0, held, false);
    wait_for(engine, filled, caller.stream());  // both slots are on their way, behind the gate
    submit(2 * kSlot, next, false);
    soon();  // the worker holds this one, and waits for the slot
    const Ticket one = submit(3 * kSlot, contested, false);
    const Ticket two = submit(4 * kSlot, contested, first);
    gate.open();
    for (const Ticket ticket : {one, two}) wait_for(engine, ticket, caller.stream());
    caller.synchronize();
    CHECK(contested == part(checkpoint, (first ? 3 : 4) * kSlot, kSlot));  // whoever was read last
  }
}

TEST_CASE("a lane whose copies are held up leaves slots to the others, whoever asked first") {
  const Accounts accounts;
  const Checkpoint checkpoint({100 * kSlot});
  Bytes before(4 * kSlot), held(100 * kSlot), free(20 * kSlot);
  Caller first(0), stuck(1), fast(2);
  Engine engine({.threads = 2, .slots_per_thread = 2, .slot_bytes = kSlot});
  checkpoint.open(engine);
  for (const int lane : {0, 1, 2}) add_lane(engine, lane);
  Gate all(first), some(stuck);
  const auto submit = [&](std::uint32_t lane, Bytes& to, Caller& caller) {
    const Read read = read_of(0, to);
    return engine.submit(lane, {&read, 1}, caller.stream(), false);
  };
  wait_for(engine, submit(0, before, first), first.stream());  // all slots are on their way, behind the gate
  const Ticket late = submit(1, held, stuck);
  const Ticket soon_there = submit(2, free, fast);
  all.open();
  wait_for(engine, soon_there, fast.stream());
  fast.synchronize();
  CHECK(free == part(checkpoint, 0, free.size()));
  some.open();
  wait_for(engine, late, stuck.stream());
  stuck.synchronize();
  CHECK(held == checkpoint.contents[0]);
}

TEST_CASE("lanes of both kinds share one engine") {
  const Accounts accounts;
  const Checkpoint checkpoint({9 * kSlot + 77});
  Bytes on_host(9 * kSlot), on_gpu(9 * kSlot);
  Caller caller(3);
  Engine engine({.threads = 2, .slot_bytes = kSlot});
  checkpoint.open(engine);
  engine.add_device(std::make_unique<HostDevice>(1));
  add_lane(engine, 3);
  const Read to_host = read_of(77, on_host), to_gpu = read_of(0, on_gpu);
  const Ticket host = engine.submit(0, {&to_host, 1}, 0, false);
  const Ticket gpu = engine.submit(1, {&to_gpu, 1}, caller.stream(), false);
  wait_for(engine, host, 0);
  CHECK(on_host == part(checkpoint, 77, 9 * kSlot));
  wait_for(engine, gpu, caller.stream());
  caller.synchronize();
  CHECK(on_gpu == part(checkpoint, 0, 9 * kSlot));
}

TEST_CASE("a weight is transposed behind its arrival, without a wait of the host") {
  const Accounts accounts;
  const Checkpoint checkpoint({2 * 100 * 90});
  Bytes scratch(2 * 100 * 90), transposed(scratch.size()), expected(scratch.size());
  Caller caller(1);
  Engine engine({.threads = 2, .slot_bytes = kSlot});
  checkpoint.open(engine);
  add_lane(engine, 1);
  const Read read = read_of(0, scratch);
  wait_for(engine, engine.submit(0, {&read, 1}, caller.stream(), false), caller.stream());
  TransposeJob job = {
      read.to, ElementType::kBFloat16, false, 100, 90, reinterpret_cast<Address>(transposed.data()), 100};
  engine.transpose_to_half(0, job, caller.stream());
  caller.synchronize();
  job.from = reinterpret_cast<Address>(checkpoint.contents[0].data());
  job.to = reinterpret_cast<Address>(expected.data());
  transpose_to_half(job, 1);
  CHECK(transposed == expected);
}

TEST_CASE("scratch is used again and again without a word to the host") {
  const Accounts accounts;
  const Checkpoint checkpoint({64 * 3 * kSlot});
  Bytes scratch(3 * kSlot);
  std::vector<Bytes> seen(64);
  Caller caller(0);
  Engine engine({.threads = 3, .slots_per_thread = 2, .slot_bytes = kSlot});
  checkpoint.open(engine);
  add_lane(engine, 0);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const Read read = read_of(i * scratch.size(), scratch);
    wait_for(engine, engine.submit(0, {&read, 1}, caller.stream(), false), caller.stream());
    caller.then([&scratch, &to = seen[i]] { to = scratch; });
  }
  caller.synchronize();
  for (std::size_t i = 0; i < seen.size(); ++i) {
    REQUIRE(seen[i] == part(checkpoint, i * scratch.size(), scratch.size()));
  }
  CHECK(fake_cuda_calls("cuEventCreate") < 64 + 6 + 2);  // one for each submission, but landings share
}

TEST_CASE("events of landings are used again") {
  const Accounts accounts;
  const Checkpoint checkpoint({kSlot});
  Bytes to(10);
  Caller caller(0);
  Engine engine({.slot_bytes = kSlot});
  checkpoint.open(engine);
  add_lane(engine, 0);
  for (int i = 0; i < 200; ++i) {
    const Read read = read_of(0, to);
    wait_for(engine, engine.submit(0, {&read, 1}, caller.stream(), false), caller.stream());
  }
  CHECK(counters().events <= 5 + 1 + 1);  // slots, landing, the last one that a worker may still hold
}

}  // namespace pyint8::testing
