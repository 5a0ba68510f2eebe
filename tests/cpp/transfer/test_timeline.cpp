// What was done when: all of it, within the time that it took, and nothing where nobody asks.
#include <algorithm>
#include <latch>
#include <thread>

#include "consumer_support.hpp"
#include "device/device_host.hpp"
#include "driver_failures.hpp"
#include "memory.hpp"

namespace pyint8::testing {
namespace {

EngineOptions timed() {
  EngineOptions options = kOptions;
  options.timeline = true;
  return options;
}

std::vector<Span> of(Engine& engine, Doing doing) {
  std::vector<Span> found = engine.timeline()->spans();
  std::erase_if(found, [&](const Span& span) { return span.doing != doing; });
  return found;
}

std::uint64_t nbytes(const std::vector<Span>& spans) {
  std::uint64_t sum = 0;
  for (const Span& span : spans) sum += span.nbytes;
  return sum;
}

void check_within(const std::vector<Span>& spans, double begin, double end) {
  constexpr double kRounding = 1e-3;  // the driver counts milliseconds in single precision
  for (const Span& span : spans) {
    CHECK(span.begin >= begin - kRounding);
    CHECK(span.begin <= span.end + kRounding);
    CHECK(span.end <= end + kRounding);
  }
}

// Work on a GPU's stream, as a consumer has it noted.
class TimedLoad final : public Load {
 public:
  void run() override {
    CudaDevice device(fake_driver(), 0);
    Timeline timeline;
    timeline.add_device(0, device);
    try {
      for (int i = 0; i < 6; ++i) work(timeline);
    } catch (...) {  // a consumer keeps it, and is closed
      timeline.settle();
      throw;
    }
    timeline.settle();
  }
  void synchronize() override { caller_.synchronize(); }
  bool arrived() const override { return true; }

 private:
  void work(Timeline& timeline) {
    auto begin = timeline.mark(0, caller_.stream()), end = timeline.mark(0, caller_.stream());
    caller_.synchronize();
    timeline.add_work(Doing::kQuantizing, 0, std::move(begin), std::move(end), 1);
  }

  Caller caller_{0};
};

// Many small copies onto GPU 0, of which the last are under way when all have been waited for.
class TimedReads {
 public:
  TimedReads() : engine(timed()) {
    checkpoint_.open(engine);
    engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 0));
  }
  ~TimedReads() { caller_.synchronize(); }
  TimedReads(const TimedReads&) = delete;
  TimedReads& operator=(const TimedReads&) = delete;

  void submit() { first_ = engine.submit(0, reads_.all(), caller_.stream(), false); }
  void wait() {
    for (std::size_t i = 0; i < reads_.all().size(); ++i) wait_for(engine, first_ + i, caller_.stream());
  }

 private:
  Random random_{3};
  Checkpoint checkpoint_{{100'001}};
  Reads reads_{checkpoint_, random_, 9, 3 * kSlot};
  Caller caller_{0};
  Ticket first_ = 0;

 public:
  Engine engine;
};

}  // namespace

TEST_CASE("reads, copies and work on GPUs are noted") {
  const Accounts accounts;
  Random random(1);
  const double begin = Timeline::now();
  Tensors tensors(random_wishes(random, 40, 250), random);
  Callers callers(2);
  Gpus gpus(tensors, callers, kLeast, timed());
  for (std::uint32_t i = 0; i < tensors.size(); ++i) gpus.submit(i % 2, tensors[i]);
  gpus.wait(0, tensors.size() / 2 - 1);
  gpus.wait(1, tensors.size() / 2 - 1);
  gpus.synchronize();
  gpus.engine.close();
  for (Consumer& consumer : gpus.consumers) consumer.close();
  const double end = Timeline::now();
  CHECK(tensors.came());
  const std::vector<Span> reads = of(gpus.engine, Doing::kReading), copies = of(gpus.engine, Doing::kCopying);
  const Stats stats = gpus.engine.stats();
  CHECK(reads.size() == stats.pieces);
  CHECK(copies.size() == stats.pieces);
  CHECK(nbytes(reads) == stats.bytes_read);
  CHECK(nbytes(copies) == stats.bytes_read);
  for (const Doing doing : {Doing::kReading, Doing::kCopying, Doing::kQuantizing}) {
    const std::vector<Span> spans = of(gpus.engine, doing);
    check_within(spans, begin, end);
    for (const std::uint32_t who : {0, 1})
      CHECK(std::ranges::any_of(spans, [&](const Span& s) { return s.who == who; }));
  }
}

TEST_CASE("a copy begins when it was issued, or when the one before it has ended") {
  const Accounts accounts;
  CudaDevice device(fake_driver(), 0);
  Timeline timeline;
  timeline.add_device(0, device);
  std::vector<std::unique_ptr<Event>> events;
  std::vector<double> issued;
  const auto copy = [&] {
    issued.push_back(Timeline::now());
    events.push_back(device.make_timed_event());
    device.record(*events.back());
  };
  Caller caller(0);
  Gate gate(caller);
  const std::unique_ptr<Event> opened = device.make_event();
  device.record_on(caller.stream(), *opened);
  device.copies_wait_for(*opened);
  for (int i = 0; i < 3; ++i) copy();
  soon();
  const double opening = Timeline::now();
  gate.open();
  device.synchronize();
  soon();
  copy();
  device.synchronize();
  for (std::size_t i = events.size(); i-- > 0;) timeline.add_copy(0, *events[i], issued[i], 5);
  timeline.add_copy(1, *events[0], issued[0], 7);  // of a device without a clock
  const std::vector<Span> spans = timeline.spans();
  REQUIRE(spans.size() == 4);
  constexpr double kRounding = 1e-3;
  CHECK(spans[0].begin == issued[0]);
  CHECK(spans[0].end >= opening - kRounding);
  CHECK(spans[1].begin == spans[0].end);
  CHECK(spans[2].begin == spans[1].end);
  CHECK(spans[3].begin >= issued[3] - kRounding);
  CHECK(spans[3].begin > spans[2].end);
  CHECK(nbytes(spans) == 4 * 5);
}

TEST_CASE("a worker that waits for a slot says so") {
  const Accounts accounts;
  const Checkpoint checkpoint({20 * kSlot});
  Bytes to(20 * kSlot);
  Caller caller(0);
  Engine engine(timed());
  checkpoint.open(engine);
  engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 0));
  const Read read{{0, 0, to.size()}, reinterpret_cast<Address>(to.data())};
  Gate gate(caller);
  const Ticket ticket = engine.submit(0, {&read, 1}, caller.stream(), false);
  soon();
  gate.open();
  wait_for(engine, ticket, caller.stream());
  engine.close();
  const std::vector<Span> waits = of(engine, Doing::kWaiting);
  CHECK(std::ranges::any_of(waits, [](const Span& span) { return span.end - span.begin > 5e-3; }));
}

TEST_CASE("host memory is read into, and nothing else") {
  const Checkpoint checkpoint({3 * kSlot});
  Bytes to(3 * kSlot);
  Engine engine(timed());
  checkpoint.open(engine);
  engine.add_device(std::make_unique<HostDevice>(1));
  const Read read{{0, 0, to.size()}, reinterpret_cast<Address>(to.data())};
  wait_for(engine, engine.submit(0, {&read, 1}, 0, false), 0);
  engine.close();
  CHECK(nbytes(of(engine, Doing::kReading)) == to.size());
  CHECK(of(engine, Doing::kCopying).empty());
}

TEST_CASE("a driver that fails while some work is over and some is not") {
  const Accounts accounts;
  Caller caller(0);
  CudaDevice device(fake_driver(), 0);
  Timeline timeline;
  timeline.add_device(0, device);
  const auto add = [&] {
    auto begin = timeline.mark(0, caller.stream());
    timeline.add_work(Doing::kQuantizing, 0, std::move(begin), timeline.mark(0, caller.stream()), 1);
  };
  add();
  caller.synchronize();
  Gate gate(caller);
  add();
  add();
  fake_cuda_fail_after("cuEventQuery", 2, 719);
  CHECK(error_of([&] { timeline.settle(); }).code() == ErrorCode::kDriver);
  gate.open();
  caller.synchronize();
  timeline.settle();
  CHECK(timeline.spans().size() <= 3);
}

TEST_CASE(
    "memory that is refused while times are taken is an error, and nothing of them is asked for again") {
  CHECK(refuse_each_allocation([] { return std::make_unique<TimedLoad>(); }) > 5);
}

TEST_CASE("a driver that fails while times are taken is an error, and nothing is left") {
  CHECK(fail_each_call([] { return std::make_unique<TimedLoad>(); }) > 10);
}

TEST_CASE("an engine that a driver's error has stopped closes without another one") {
  int failures = 0;
  for (int record = 1; record <= 12; ++record) {
    CAPTURE(record);
    const Accounts accounts;
    TimedReads reads;
    reads.submit();
    fake_cuda_fail_after("cuEventRecord", record, 719);
    const std::optional<ErrorCode> error = error_code([&] { reads.wait(); });
    fake_cuda_fail_after("cuEventRecord", 0, 0);
    failures += error == ErrorCode::kDriver ? 1 : 0;
    CHECK_NOTHROW(reads.engine.close());
  }
  CHECK(failures > 0);
}

TEST_CASE("of two threads that close, one notes the copies that were under way") {
  for (int round = 0; round < 20; ++round) {
    const Accounts accounts;
    TimedReads reads;
    reads.submit();
    reads.wait();
    std::latch both(2);
    const auto close = [&] {
      both.arrive_and_wait();
      reads.engine.close();
    };
    std::jthread other(close);
    close();
    other.join();
    CHECK(nbytes(of(reads.engine, Doing::kCopying)) == reads.engine.stats().bytes_read);
  }
}

TEST_CASE("nothing is noted unless it is asked for") {
  Engine engine(kOptions);
  CHECK(engine.timeline() == nullptr);
}

}  // namespace pyint8::testing
