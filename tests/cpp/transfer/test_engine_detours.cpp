// Bytes that reach a GPU over its neighbours' buses: they come as over its own, and nothing of theirs is
// kept.
#include <algorithm>
#include <atomic>
#include <deque>
#include <future>
#include <latch>
#include <thread>

#include "cuda_support.hpp"
#include "device/detour_cuda.hpp"
#include "device/device_host.hpp"
#include "driver_failures.hpp"
#include "engine_support.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kSlot = 8192;
constexpr EngineOptions kOptions = {.threads = 4, .slots_per_thread = 2, .slot_bytes = kSlot};
constexpr int kHermit = 3;  // of the fake's devices

std::vector<std::unique_ptr<Detour>> detours_by(const std::vector<int>& neighbours) {
  std::vector<std::unique_ptr<Detour>> detours;
  for (const int neighbour : neighbours) {
    detours.push_back(std::make_unique<CudaDetour>(fake_driver(), neighbour, 0));
  }
  return detours;
}

std::int64_t on_detours() {
  return fake_cuda_calls("cuMemcpyDtoDAsync_v2");
}

// GPU 0, whose caller reads a checkpoint.
class OneGpu final : public Load {
 public:
  explicit OneGpu(const EngineOptions& options = kOptions, std::vector<int> neighbours = {1})
      : options_(options), neighbours_(std::move(neighbours)), checkpoint_({100001, 7777}), caller_(0) {
    for (int batch = 0; batch < 6; ++batch) reads_.emplace_back(checkpoint_, random_, 9, 3 * kSlot);
  }

  // Opens the detours before a batch of this number.
  void run_with_detours_from(int number) {
    Engine engine(options_);
    checkpoint_.open(engine);
    engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 0));
    std::vector<Ticket> tickets;
    for (int batch = 0; batch < 6; ++batch) {
      if (batch == number) engine.add_detours(0, detours_by(neighbours_));
      const Ticket first = engine.submit(0, reads_[batch].all(), caller_.stream(), batch == 3);
      for (std::size_t i = 0; i < reads_[batch].all().size(); ++i) tickets.push_back(first + i);
    }
    std::shuffle(tickets.begin(), tickets.end(), random_);
    for (const Ticket ticket : tickets) wait_for(engine, ticket, caller_.stream());
    engine.close();
  }
  void run() override { run_with_detours_from(0); }
  void synchronize() override { caller_.synchronize(); }
  bool arrived() const override {
    return std::ranges::all_of(reads_, [](const Reads& reads) { return reads.arrived(); });
  }
  const std::deque<Reads>& reads() const { return reads_; }

 private:
  const EngineOptions options_;
  const std::vector<int> neighbours_;
  Random random_{11};
  Checkpoint checkpoint_;
  std::deque<Reads> reads_;
  Caller caller_;
};

// One that leads nowhere, and does what a test says when it is asked for something.
class HookedDetour final : public Detour {
 public:
  ~HookedDetour() override { when_it_goes(); }
  std::unique_ptr<Event> make_event() override { return DiscardingDevice().make_event(); }
  void copy(Address, const std::byte*, std::size_t) override {}
  void record(Event&) override {}
  void copies_wait_for(const Event&) override {}
  void synchronize() override { when_waited_for(); }
  void stage(const std::byte*, std::size_t) override { when_staged(); }
  bool reaches(Address) const override { return false; }

  std::function<void()> when_waited_for = [] {}, when_staged = [] {}, when_it_goes = [] {};
};

void add(Engine& engine, std::unique_ptr<HookedDetour> detour) {
  std::vector<std::unique_ptr<Detour>> detours;
  detours.push_back(std::move(detour));
  engine.add_detours(0, std::move(detours));
}

// Holds somebody up until the engine has answered somebody else, or it is clear that it will not.
class Question {
 public:
  void hold_up() {
    is_held_up_.count_down();
    was_answered_ = answer_.get_future().wait_for(kPatience / 10) == std::future_status::ready;
  }
  void ask(Engine& engine) {
    is_held_up_.wait();
    error_code([&] { engine.promise(0, 1); });
    answer_.set_value();
  }
  bool was_answered() const { return was_answered_; }

 private:
  std::latch is_held_up_{1};
  std::promise<void> answer_;
  std::atomic<bool> was_answered_ = false;
};

}  // namespace

TEST_CASE("every read is byte-exact, whichever road its pieces take") {
  for (const auto& neighbours : {std::vector{1}, std::vector{2, 1}}) {
    for (const std::size_t threads : {1, 2, 3, 5}) {
      for (const std::size_t slots : {1, 3}) {
        for (const int from : {0, 4}) {
          CAPTURE(neighbours.size());
          CAPTURE(threads);
          CAPTURE(slots);
          CAPTURE(from);
          const Accounts accounts;
          const bool takes_detours = threads > neighbours.size() && from == 0;
          // Which worker is quick enough to take a job is up to the system: again, until one on a detour is.
          for (int attempt = 0; attempt < 100; ++attempt) {
            OneGpu load({.threads = threads, .slots_per_thread = slots, .slot_bytes = kSlot}, neighbours);
            load.run_with_detours_from(from);
            load.synchronize();
            CHECK(load.arrived());
            if (!takes_detours || on_detours() > 0) break;
          }
          if (takes_detours) CHECK(on_detours() > 0);
        }
      }
    }
  }
}

TEST_CASE("where a detour does not lead, bytes take the device's own bus") {
  const Accounts accounts;
  OneGpu load;
  fake_cuda_hide(nullptr, ~std::uint64_t{0});
  load.run();
  load.synchronize();
  CHECK(load.arrived());
  CHECK(on_detours() == 0);
}

TEST_CASE("a GPU whose memory cannot be written to from there has no such neighbour") {
  const Accounts accounts;
  for (const auto& [neighbour, to] : {std::pair{kHermit, 0}, {0, kHermit}, {1, 1}}) {
    CHECK_THROWS_WITH_AS(CudaDetour(fake_driver(), neighbour, to),
                         doctest::Contains("cannot write to the memory of GPU"), Error);
  }
  CHECK_THROWS_AS(CudaDetour(fake_driver(), 77, 0), Error);
}

TEST_CASE("access that somebody else had enabled is left to him") {
  const Accounts accounts;
  Caller one(0), other(1);
  CudaContext context(fake_driver(), 1), to(fake_driver(), 0);
  {
    const CudaContext::Scope scope(context);
    REQUIRE(context.api().context_enable_peer_access(to.handle(), 0) == 0);
  }
  OneGpu().run();
  CHECK(counters().peer_accesses == 1);
  const CudaContext::Scope scope(context);
  CHECK(context.api().context_disable_peer_access(to.handle()) == 0);
}

TEST_CASE("staging memory is no more than the slots of those who take the detour") {
  const Accounts accounts;
  Engine engine({.threads = 5, .slots_per_thread = 2, .slot_bytes = kSlot});
  Caller caller(0);
  engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 0));
  engine.add_detours(0, detours_by({1}));
  CHECK(counters().device_bytes == 2 * 2 * kSlot);  // of two workers
  CHECK_THROWS_WITH_AS(engine.add_detours(0, detours_by({2})), doctest::Contains("already"), Error);
  CHECK_THROWS_AS(engine.add_detours(0, {}), Error);
  engine.close();
  CHECK(counters().device_bytes == 0);
  CHECK(counters().peer_accesses == 0);
  CHECK_THROWS_AS(engine.add_detours(0, detours_by({2})), Error);
}

TEST_CASE("a neighbour that is full is left out, and no other") {
  for (const int full : {1, 2}) {
    CAPTURE(full);
    const Accounts accounts;
    Random random(5);
    const Checkpoint checkpoint({100'001});
    Reads reads(checkpoint, random, 9, 3 * kSlot);
    Caller caller(0), one(1), other(2);
    Engine engine(kOptions);
    checkpoint.open(engine);
    engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 0));
    fake_cuda_fail_after("cuMemAlloc_v2", full, 2);
    const std::vector<Engine::Refused> refused = engine.add_detours(0, detours_by({2, 1}));
    REQUIRE(refused.size() == 1);
    CHECK(refused[0].number == static_cast<std::size_t>(full) - 1);
    CHECK(contains(refused[0].reason, "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"));
    CHECK(counters().peer_accesses == 1);
    CHECK(counters().device_bytes == 2 * kSlot);  // of one worker of four, as if there were two detours
    const Ticket first = engine.submit(0, reads.all(), caller.stream(), false);
    for (std::size_t i = 0; i < reads.all().size(); ++i) wait_for(engine, first + i, caller.stream());
    caller.synchronize();
    CHECK(reads.arrived());
    engine.close();
    CHECK(counters().peer_accesses == 0);
  }
}

TEST_CASE("where all neighbours are full there are no detours") {
  const Accounts accounts;
  Caller caller(0);
  Engine engine(kOptions);
  engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 0));
  fake_cuda_fail_after("cuMemAlloc_v2", 1, 2);
  CHECK(engine.add_detours(0, detours_by({1})).size() == 1);
  CHECK(counters().peer_accesses == 0);
  CHECK(engine.add_detours(0, detours_by({1})).empty());
}

TEST_CASE("a lane that is read into in place has no bus that there could be a way around") {
  Engine engine(kOptions);
  engine.add_device(std::make_unique<HostDevice>(1));
  CHECK(error_of([&] { add(engine, std::make_unique<HookedDetour>()); }).code() ==
        ErrorCode::kInvalidArgument);
}

TEST_CASE("of two threads that close, neither takes from the other what it waits for") {
  std::atomic<bool> is_waited_for = false, is_gone = false, went_too_soon = false;
  Engine engine(kOptions);
  engine.add_device(std::make_unique<DiscardingDevice>());
  auto detour = std::make_unique<HookedDetour>();
  detour->when_waited_for = [&] {
    if (is_waited_for.exchange(true)) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    went_too_soon = is_gone.load();
  };
  detour->when_it_goes = [&] { is_gone = true; };
  add(engine, std::move(detour));
  std::jthread other([&] { engine.close(); });
  while (!is_waited_for) std::this_thread::yield();
  engine.close();
  CHECK(is_gone);
  other.join();
  CHECK_FALSE(went_too_soon);
}

TEST_CASE("while a detour goes, which may take its neighbour's time, others are answered") {
  Question question;
  Engine engine(kOptions);
  engine.add_device(std::make_unique<DiscardingDevice>());
  auto detour = std::make_unique<HookedDetour>();
  detour->when_it_goes = [&] { question.hold_up(); };
  add(engine, std::move(detour));
  std::jthread closing([&] { engine.close(); });
  question.ask(engine);
  closing.join();
  CHECK(question.was_answered());
}

TEST_CASE("while a detour is opened, others are answered, and a close waits") {
  Question question;
  Engine engine(kOptions);
  engine.add_device(std::make_unique<DiscardingDevice>());
  auto detour = std::make_unique<HookedDetour>();
  detour->when_staged = [&] { question.hold_up(); };
  std::atomic<bool> is_gone = false;
  detour->when_it_goes = [&] { is_gone = true; };
  std::jthread opening([&, detour = std::move(detour)]() mutable { add(engine, std::move(detour)); });
  question.ask(engine);
  opening.join();
  CHECK(question.was_answered());
  engine.close();
  CHECK(is_gone);
}

TEST_CASE("where a context cannot be made current, access that others have is not ended") {
  for (int push = 1; push <= 8; ++push) {
    CAPTURE(push);
    Accounts accounts;
    accounts.ignore();  // what cannot be given back is left
    Caller one(0), other(1), another(2);
    CudaContext theirs(fake_driver(), 2), to(fake_driver(), 0);
    auto detour = std::make_unique<CudaDetour>(fake_driver(), 1, 0);
    const CudaContext::Scope scope(theirs);
    REQUIRE(theirs.api().context_enable_peer_access(to.handle(), 0) == 0);
    fake_cuda_fail_after("cuCtxPushCurrent_v2", push, 4);
    detour.reset();
    fake_cuda_fail_after("cuCtxPushCurrent_v2", 0, 0);
    CHECK(theirs.api().context_disable_peer_access(to.handle()) == 0);
  }
}

TEST_CASE("with detours, too, a driver that fails at any call gives an error, and nothing is left") {
  EngineOptions options = kOptions;
  options.timeline = true;
  CHECK(fail_each_call([&] { return std::make_unique<OneGpu>(options, std::vector{2, 1}); }) > 50);
}

}  // namespace pyint8::testing
