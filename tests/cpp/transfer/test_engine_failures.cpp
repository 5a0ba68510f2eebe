// What is left when something goes wrong: nothing.
#include <algorithm>
#include <atomic>
#include <future>
#include <thread>

#include "cuda_support.hpp"
#include "device/device_host.hpp"
#include "driver_failures.hpp"
#include "engine_support.hpp"
#include "memory.hpp"
#include "pread.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kSlot = 8192;
constexpr int kLanes = 3;
constexpr EngineOptions kOptions = {.threads = 2, .slots_per_thread = 2, .slot_bytes = kSlot};

Read whole(Bytes& to) {
  return {{0, 0, to.size()}, reinterpret_cast<Address>(to.data())};
}

void add_lane(Engine& engine, int ordinal) {
  engine.add_device(std::make_unique<CudaDevice>(fake_driver(), ordinal));
}

// In each test destinations come before the callers and the engine, so that they outlive all that uses
// them.

// A whole load in little: files, lanes, reads, waits, a transposition, an end.
class EngineLoad final : public Load {
 public:
  explicit EngineLoad(bool timeline) : timeline_(timeline), checkpoint_({10 * kSlot + 5}) {
    for (int lane = 0; lane < kLanes; ++lane) consumers_.emplace_back(lane);
  }

  void run() override {
    EngineOptions options = kOptions;
    options.timeline = timeline_;
    Engine engine(options);
    checkpoint_.open(engine);
    std::vector<Ticket> tickets;
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      add_lane(engine, static_cast<int>(lane));
      tickets.push_back(engine.submit(lane, reads_[lane].all(), consumers_[lane].stream(), lane == 1));
    }
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      for (std::size_t i = 0; i < reads_[lane].all().size(); ++i) {
        wait_for(engine, tickets[lane] + i, consumers_[lane].stream());
      }
    }
    engine.transpose_to_half(1, weight_, consumers_[1].stream());
    engine.close();
  }
  void synchronize() override {
    for (Caller& caller : consumers_) caller.synchronize();
  }
  bool arrived() const override {
    return std::all_of(reads_.begin(), reads_.end(), [](const Reads& reads) { return reads.arrived(); });
  }

 private:
  const bool timeline_;
  Checkpoint checkpoint_;
  std::deque<Caller> consumers_;
  Random random_{7};
  std::array<Reads, kLanes> reads_ = {Reads(checkpoint_, random_, 6, 3 * kSlot),
                                      Reads(checkpoint_, random_, 6, 3 * kSlot),
                                      Reads(checkpoint_, random_, 6, 3 * kSlot)};
  std::array<std::uint16_t, 4> from_{}, to_{};
  TransposeJob weight_ = {reinterpret_cast<Address>(from_.data()),
                          ElementType::kHalf,
                          false,
                          2,
                          2,
                          reinterpret_cast<Address>(to_.data()),
                          2};
};

}  // namespace

TEST_CASE("a driver that fails at any call gives an error, and nothing is left, nothing hangs") {
  for (const bool timeline : {false, true}) {
    CHECK(fail_each_call([&] { return std::make_unique<EngineLoad>(timeline); }) > 50);
  }
}

TEST_CASE("memory that is refused at any allocation is an error, and nothing is left, nothing hangs") {
  for (const bool timeline : {false, true}) {
    CHECK(refuse_each_allocation([&] { return std::make_unique<EngineLoad>(timeline); }) > 10);
  }
}

TEST_CASE("memory that cannot be pinned is an error of submit, which may be tried again") {
  const Accounts accounts;
  const Checkpoint checkpoint({kSlot});
  Bytes to(kSlot);
  Caller caller(0);
  Engine engine(kOptions);
  checkpoint.open(engine);
  add_lane(engine, 0);
  const Read read = whole(to);
  fake_cuda_fail_after("cuMemHostRegister_v2", 1, 2);
  const Error error = error_of([&] { engine.submit(0, {&read, 1}, caller.stream(), false); });
  CHECK(contains(error.message(), "is `ulimit -l` too small for the ring?"));
  wait_for(engine, engine.submit(0, {&read, 1}, caller.stream(), false), caller.stream());
  caller.synchronize();
  CHECK(to == checkpoint.contents[0]);
}

TEST_CASE("a truncated file among good ones") {
  for (const bool direct_io : {false, true}) {
    const Accounts accounts;
    const Checkpoint checkpoint({64 * kSlot, 100});
    std::vector<Bytes> to(50, Bytes(64 * kSlot));
    Caller caller(0);
    Engine engine({.threads = 3, .slots_per_thread = 1, .slot_bytes = kSlot, .direct_io = direct_io});
    checkpoint.open(engine);
    add_lane(engine, 0);
    std::vector<Read> reads;
    for (Bytes& bytes : to) reads.push_back(whole(bytes));
    reads[20].range.file = 1;
    const Ticket ticket = engine.submit(0, reads, caller.stream(), false);
    for (const Ticket lost : {ticket + 20, ticket + 49}) {
      const Error error = error_of([&] { engine.wait(lost, caller.stream(), kPatience); });
      CHECK(error.code() == ErrorCode::kTruncated);
      CHECK(error.path() == checkpoint.files[1].path());
      CHECK(error.offset() >= 100);  // where the piece that failed begins, if that is later
    }
  }
}

TEST_CASE("close while busy ends the copies, and after it no destination is written") {
  const Accounts accounts;
  const Checkpoint checkpoint({64 * kSlot});
  std::vector<Bytes> to(60, Bytes(64 * kSlot));
  std::deque<Caller> callers;
  Engine engine(kOptions);
  checkpoint.open(engine);
  for (std::size_t i = 0; i < to.size(); ++i) {
    const auto lane = static_cast<std::uint32_t>(i % kLanes);
    if (i < kLanes) add_lane(engine, static_cast<int>(lane));
    if (i < kLanes) callers.emplace_back(static_cast<int>(lane));
    const Read read = whole(to[i]);
    engine.submit(lane, {&read, 1}, callers[lane].stream(), false);
  }
  engine.close();
  CHECK(pinned_bytes_in_use() == 0);
  CHECK(counters().violations == 0);
  const std::vector<Bytes> after = to;
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(after == to);
  CHECK(error_of([&] { engine.wait(59, 0, kPatience); }).code() == ErrorCode::kCancelled);
}

TEST_CASE("who waits while close waits for copies is told at once") {
  const Accounts accounts;
  const Checkpoint checkpoint({kSlot});
  Bytes to(kSlot);
  Caller caller(0);
  const std::size_t threads = running_threads();
  Engine engine(kOptions);
  checkpoint.open(engine);
  add_lane(engine, 0);
  const std::size_t of_device = running_threads() - threads - kOptions.threads;
  Gate gate(caller);
  const Read read = whole(to);
  wait_for(engine, engine.submit(0, {&read, 1}, caller.stream(), false), caller.stream());
  const Ticket ticket = engine.submit(0, {&read, 1}, caller.stream(), false);
  std::jthread closing([&] { engine.close(); });
  CHECK(threads_become(threads + of_device + 1));  // the workers have ended: what is left is the copy
  auto waiting =
      std::async([&] { return error_of([&] { engine.wait(ticket, caller.stream(), kPatience); }).code(); });
  CHECK(waiting.wait_for(kPatience / 2) == std::future_status::ready);
  gate.open();
  CHECK(waiting.get() == ErrorCode::kCancelled);
}

TEST_CASE("a lane whose driver fails at the end does not keep the others from being waited for") {
  const Accounts accounts;
  const Checkpoint checkpoint({kSlot});
  Bytes to(kSlot);
  Caller failing(0), slow(1);
  Engine engine(kOptions);
  checkpoint.open(engine);
  add_lane(engine, 0);
  add_lane(engine, 1);
  const Read read = whole(to);
  Gate gate(slow);
  wait_for(engine, engine.submit(1, {&read, 1}, slow.stream(), false), slow.stream());
  fake_cuda_fail_after("cuStreamSynchronize", 1, 719);
  std::jthread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    gate.open();
  });
  CHECK(error_of([&] { engine.close(); }).code() == ErrorCode::kDriver);
  CHECK(to == checkpoint.contents[0]);
  CHECK(pinned_bytes_in_use() == 0);
}

TEST_CASE("callers may submit, wait and close from threads of their own") {
  const Accounts accounts;
  const Checkpoint checkpoint({10 * kSlot + 5});
  for (int round = 0; round < 20; ++round) {
    std::vector<Bytes> to(kLanes, Bytes(10 * kSlot + 5));
    std::atomic<int> wrong = 0;
    std::deque<Caller> callers;
    Engine engine(kOptions);
    checkpoint.open(engine);
    std::vector<std::jthread> threads;
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      add_lane(engine, static_cast<int>(lane));
      callers.emplace_back(static_cast<int>(lane));
    }
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      threads.emplace_back([&, lane] {
        const Read read = whole(to[lane]);
        Caller& caller = callers[lane];
        try {
          for (;;) {
            const Ticket ticket = engine.submit(lane, {&read, 1}, caller.stream(), false);
            if (!engine.wait(ticket, caller.stream(), kPatience)) ++wrong;
            caller.then([&, lane] { wrong += to[lane] != checkpoint.contents[0]; });
          }
        } catch (const Error& error) {
          wrong += error.code() != ErrorCode::kCancelled;
        }
      });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(round));
    engine.close();
    threads.clear();
    for (Caller& caller : callers) caller.synchronize();
    CHECK(wrong == 0);
  }
}

TEST_CASE("a close waits for one read on slow storage, not for all that a worker was given") {
  constexpr std::size_t kReads = 200;
  const Checkpoint checkpoint({kReads});
  Bytes to(kReads);
  Engine engine({.threads = 1, .slots_per_thread = 1, .slot_bytes = kSlot});
  checkpoint.open(engine);
  engine.add_device(std::make_unique<HostDevice>(1));
  std::vector<Read> reads;
  for (std::size_t i = 0; i < kReads; ++i) {
    reads.push_back({{0, i, 1}, reinterpret_cast<Address>(to.data() + i)});
  }
  const std::size_t before = all_reads();
  read_milliseconds = 50;
  engine.submit(0, reads, 0, false);
  while (all_reads() == before) std::this_thread::yield();
  engine.close();
  read_milliseconds = 0;
  CHECK(all_reads() - before <= 2);
}

TEST_CASE("an engine of a process that forked belongs to that process") {
  const Checkpoint checkpoint({kSlot});
  Engine engine(kOptions);
  checkpoint.open(engine);
  engine.add_device(std::make_unique<HostDevice>(1));
  CHECK(exit_code_of_child([&] {
          if (engine.is_of_this_process()) return 1;
          if (error_code([&] { engine.wait(0, 0, kPatience); }) != ErrorCode::kCancelled) return 2;
          engine.close();
          return 0;
        }) == 0);
}

}  // namespace pyint8::testing
