#include <algorithm>
#include <deque>

#include "cuda_support.hpp"
#include "engine_support.hpp"
#include "fake_cuda_kernels.hpp"
#include "quantize/consumer.hpp"

// bitsandbytes' function, as the fake driver has it.
extern "C" void cint8_vector_quant(const void*, void*, void*, float, int, int, std::uintptr_t);

namespace pyint8::testing {
namespace {

constexpr std::size_t kScratch = 64 << 10;  // bands of 8 KiB
constexpr std::size_t kTransposed = 1 << 20;

Address address_of(const void* data) {
  return reinterpret_cast<Address>(data);
}

// What becomes of some bytes of a file, by a request and by plain loops.
struct Wanted {
  ElementType stored = ElementType::kBFloat16;
  std::size_t rows = 0, columns = 0;
  std::uint64_t offset = 0;
  std::optional<ElementType> dtype = std::nullopt;  // of values; none: to int8, or as stored
  bool to_int8 = false, transposed = false, through_bfloat16 = false;

  Bytes codes = {}, scales = {}, values = {}, marks = {};  // by the consumer
  Bytes expected_codes = {}, expected_scales = {}, expected_values = {}, expected_marks = {};  // by the loops

  std::size_t nbytes() const { return rows * columns * size_of(stored); }
  std::size_t out_rows() const { return transposed ? columns : rows; }

  Request request(std::uint32_t file = 0) {
    Request made{Range{file, offset, nbytes()}, stored, rows, columns, {}, address_of(marks.data())};
    if (to_int8) {
      made.to = ToInt8{through_bfloat16, transposed, address_of(codes.data()), address_of(scales.data())};
    } else if (dtype) {
      made.to = ToValues{dtype, address_of(values.data())};
      if (dtype != ElementType::kHalf) made.marks = 0;
    } else {
      made.to = ToValues{std::nullopt, address_of(values.data())};
      made.rows = 1;
      made.columns = nbytes();
      made.marks = 0;
    }
    return made;
  }

  void allocate() {
    codes.resize(to_int8 ? rows * columns : 0);
    scales.resize(to_int8 ? out_rows() * sizeof(float) : 0);
    values.resize(to_int8 ? 0 : rows * columns * size_of(dtype.value_or(stored)));
    marks.resize(to_int8 ? out_rows() : 1);
    expected_codes = codes, expected_scales = scales, expected_values = values, expected_marks = marks;
  }

  void expect(const Bytes& file) {
    const auto begin = file.begin() + static_cast<std::ptrdiff_t>(offset);
    const Bytes bytes(begin, begin + static_cast<std::ptrdiff_t>(nbytes()));
    if (to_int8) {
      expect_int8(bytes);
    } else if (dtype) {
      const Address at = *dtype == ElementType::kHalf ? address_of(expected_marks.data()) : 0;
      cast({address_of(bytes.data()), stored, false, rows * columns, address_of(expected_values.data()),
            *dtype, at, rows * columns, Marks::kOverflow});
    } else {
      expected_values = bytes;
    }
  }

  void expect_int8(const Bytes& bytes) {
    std::vector<std::uint16_t> half(rows * columns);
    if (transposed) {
      transpose_to_half(
          {address_of(bytes.data()), stored, through_bfloat16, rows, columns, address_of(half.data()), rows},
          1);
    } else {
      const bool through = through_bfloat16 && stored != ElementType::kBFloat16;
      cast({address_of(bytes.data()), stored, through, half.size(), address_of(half.data()),
            ElementType::kHalf});
    }
    const std::size_t out_columns = transposed ? rows : columns;
    cast({address_of(half.data()), ElementType::kHalf, false, half.size(), address_of(half.data()),
          ElementType::kHalf, address_of(expected_marks.data()), out_columns});
    fake_cuda::quantize_rows(half.data(), expected_codes.data(), expected_scales.data(),
                             static_cast<int>(out_rows()), static_cast<int>(out_columns));
  }

  bool is_as_expected() const {
    return codes == expected_codes && scales == expected_scales && values == expected_values &&
           marks == expected_marks;
  }
};

Wanted any(Random& random, const Bytes& file) {
  constexpr std::array kTypes = {ElementType::kHalf, ElementType::kBFloat16, ElementType::kFloat};
  Wanted made{};
  made.stored = kTypes[pick(random, 0, 2)];
  made.columns = pick(random, 1, 500);
  made.rows = pick(random, 1, 60);
  made.to_int8 = pick(random, 0, 1) == 1;
  made.transposed = made.to_int8 && pick(random, 0, 1) == 1;
  made.through_bfloat16 = made.to_int8 && pick(random, 0, 1) == 1;
  const ElementType dtype = kTypes[pick(random, 0, 2)];
  if (!made.to_int8 && dtype != made.stored) made.dtype = dtype;
  made.offset = pick(random, 0, file.size() - made.nbytes());
  made.allocate();
  made.expect(file);
  return made;
}

// A consumer with memory, an engine and a caller of its own on one lane.
struct Lane {
  Lane(Engine& engine, std::uint32_t number, std::size_t scratch_bytes = kScratch)
      : scratch(scratch_bytes), transposed(kTransposed), caller(static_cast<int>(number)) {
    engine.add_device(std::make_unique<CudaDevice>(fake_driver(), static_cast<int>(number)));
    consumer.emplace(engine, number,
                     ConsumerOptions{address_of(scratch.data()), scratch.size(),
                                     address_of(transposed.data()), transposed.size(), cint8_vector_quant});
  }
  std::optional<Ticket> wait(Ticket ticket) { return consumer->wait(ticket, caller.stream(), kPatience); }

  Bytes scratch, transposed;
  Caller caller;
  std::optional<Consumer> consumer;
};

// An engine on one file, with lanes.
struct Setup {
  explicit Setup(std::uint32_t lane_count = 1, std::size_t file_bytes = 400000)
      : checkpoint({file_bytes}), engine({.threads = 3, .slots_per_thread = 2, .slot_bytes = 8192}) {
    checkpoint.open(engine);
    for (std::uint32_t number = 0; number < lane_count; ++number) lanes.emplace_back(engine, number);
  }
  ~Setup() {
    engine.close();
    for (Lane& lane : lanes) lane.consumer->close();
  }
  const Bytes& file() const { return checkpoint.contents[0]; }

  Checkpoint checkpoint;
  Engine engine;
  std::deque<Lane> lanes;
};

Wanted weight(std::size_t rows, std::size_t columns, bool transposed = false) {
  Wanted made{.stored = ElementType::kBFloat16,
              .rows = rows,
              .columns = columns,
              .to_int8 = true,
              .transposed = transposed};
  made.allocate();
  return made;
}

ErrorCode refusal_of(Lane& lane, const Request& request) {
  return error_of([&] { lane.consumer->submit({&request, 1}, lane.caller.stream()); }).code();
}

}  // namespace

TEST_CASE("whatever is asked for, on however many lanes, is made byte for byte") {
  Random random(3);
  for (const std::uint32_t lanes : {1u, 3u}) {
    const Accounts accounts;
    std::deque<Wanted> wanted;
    Setup setup(lanes);
    std::vector<std::pair<Lane*, Ticket>> tickets;
    for (int batch = 0; batch < 20; ++batch) {
      Lane& lane = setup.lanes[pick(random, 0, lanes - 1)];
      std::vector<Request> requests;
      for (std::size_t i = pick(random, 1, 12); i > 0; --i) {
        requests.push_back(wanted.emplace_back(any(random, setup.file())).request());
      }
      const Ticket first = lane.consumer->submit(requests, lane.caller.stream());
      for (std::size_t i = 0; i < requests.size(); ++i) tickets.emplace_back(&lane, first + i);
    }
    std::shuffle(tickets.begin(), tickets.end(), random);
    for (const auto& [lane, ticket] : tickets) {
      const std::optional<Ticket> ready = lane->wait(ticket);
      REQUIRE(ready.has_value());
      REQUIRE(*ready > ticket);
      REQUIRE(lane->consumer->done() >= *ready);
    }
    for (Lane& lane : setup.lanes) lane.caller.synchronize();
    for (const Wanted& each : wanted) {
      CAPTURE(static_cast<int>(each.stored));
      CAPTURE(each.rows);
      CAPTURE(each.columns);
      CAPTURE(each.to_int8);
      CAPTURE(each.transposed);
      CAPTURE(each.through_bfloat16);
      REQUIRE(each.is_as_expected());
    }
  }
}

TEST_CASE(
    "the caller's stream is ordered behind what it waited for, and nothing is written before it allows") {
  const Accounts accounts;
  Wanted wanted = weight(100, 200);  // fits the slots, which copies that are held up fill
  Setup setup;
  wanted.expect(setup.file());
  Lane& lane = setup.lanes[0];
  bool written = false, whole = false;
  Gate gate(lane.caller);
  lane.caller.then([&] { written = wanted.codes != Bytes(wanted.codes.size()); });
  const Request request = wanted.request();
  const Ticket ticket = lane.consumer->submit({&request, 1}, lane.caller.stream());
  REQUIRE(lane.wait(ticket).has_value());  // which does not mean that it has happened
  lane.caller.then([&] { whole = wanted.is_as_expected(); });
  gate.open();
  lane.caller.synchronize();
  CHECK(!written);
  CHECK(whole);
}

TEST_CASE("bytes that landed before are made of where they are") {
  const Accounts accounts;
  std::deque<Wanted> wanted = {weight(300, 200), weight(70, 90, true)};
  wanted.push_back({.stored = ElementType::kFloat, .rows = 50, .columns = 60, .dtype = ElementType::kHalf});
  wanted.push_back({.stored = ElementType::kHalf, .rows = 50, .columns = 60});
  std::deque<Bytes> landed;
  Setup setup;
  Lane& lane = setup.lanes[0];
  std::vector<Request> requests;
  for (Wanted& each : wanted) {
    each.allocate();
    each.expect(setup.file());
    Bytes& memory = landed.emplace_back(each.nbytes());
    const Read read{{0, each.offset, each.nbytes()}, address_of(memory.data())};
    Request request = each.request();
    request.from = Landed{setup.engine.submit(0, {&read, 1}, lane.caller.stream(), false), read.to};
    requests.push_back(request);
  }
  lane.consumer->submit(requests, lane.caller.stream());
  REQUIRE(lane.wait(wanted.size() - 1) == wanted.size());
  lane.caller.synchronize();
  for (const Wanted& each : wanted) CHECK(each.is_as_expected());
}

TEST_CASE("what cannot be served is refused, and none of its batch is taken") {
  const Accounts accounts;
  std::deque<Wanted> wanted = {weight(2, 5000), weight(2000, 4000, true), weight(0, 5), weight(5, 5)};
  Setup setup;
  Lane& lane = setup.lanes[0];
  for (int i = 0; i < 3; ++i) CHECK(refusal_of(lane, wanted[i].request()) == ErrorCode::kInvalidArgument);
  Request request = wanted[3].request();
  request.from = Range{0, 0, 49};
  CHECK(refusal_of(lane, request) == ErrorCode::kInvalidArgument);
  request = wanted[3].request();
  request.to = ToValues{ElementType::kFloat, address_of(wanted[3].codes.data())};
  CHECK(refusal_of(lane, request) == ErrorCode::kInvalidArgument);  // marks
  request = wanted[3].request(7);
  CHECK(refusal_of(lane, request) == ErrorCode::kInvalidArgument);  // there is no such file
}

TEST_CASE("a ticket that there is not, and a wait that takes too long") {
  const Accounts accounts;
  Wanted wanted = weight(300, 200);
  Setup setup;
  Lane& lane = setup.lanes[0];
  CHECK(error_of([&] { lane.wait(0); }).code() == ErrorCode::kInvalidArgument);
  Gate gate(lane.caller);
  const Request request = wanted.request();
  lane.consumer->submit({&request, 1}, lane.caller.stream());
  gate.open();
  REQUIRE(lane.wait(0) == 1);
  lane.caller.synchronize();
}

TEST_CASE("a file that is too short is the error of every wait, with its offset") {
  const Accounts accounts;
  Wanted wanted = weight(300, 200);
  Setup setup(1, 50000);
  Lane& lane = setup.lanes[0];
  const Request request = wanted.request();
  lane.consumer->submit({&request, 1}, lane.caller.stream());
  for (int i = 0; i < 2; ++i) {
    const Error error = error_of([&] { lane.wait(0); });
    CHECK(error.code() == ErrorCode::kTruncated);
    CHECK(error.path() == setup.checkpoint.files[0].path());
  }
}

TEST_CASE("each call of the driver that fails is an error, and nothing is left behind") {
  for (const char* entry_point : {"cuLaunchKernel", "cuModuleGetFunction", "cuStreamWaitEvent",
                                  "cuEventRecord", "cuMemcpyHtoDAsync_v2", "cuEventCreate"}) {
    for (const int nth : {1, 3}) {
      CAPTURE(entry_point);
      CAPTURE(nth);
      const Accounts accounts;
      std::deque<Wanted> wanted = {weight(300, 200), weight(90, 80, true), weight(10, 10)};
      Setup setup;
      Lane& lane = setup.lanes[0];
      std::vector<Request> requests;
      for (Wanted& each : wanted) requests.push_back(each.request());
      fake_cuda_fail_after(entry_point, nth, 719);
      try {
        lane.consumer->submit(requests, lane.caller.stream());
        for (Ticket ticket = 0; ticket < 3; ++ticket) lane.wait(ticket);
      } catch (const Error& error) {
        CHECK(error.code() == ErrorCode::kDriver);
      }
      fake_cuda_fail_after(entry_point, 0, 0);
    }
  }
}

TEST_CASE("what is closed while work is under way writes no more, and waits say so") {
  const std::size_t threads = running_threads();
  for (int round = 0; round < 10; ++round) {
    const Accounts accounts;
    std::deque<Wanted> wanted;
    for (int i = 0; i < 30; ++i) wanted.push_back(weight(300, 200));
    Setup setup;
    Lane& lane = setup.lanes[0];
    std::vector<Request> requests;
    for (Wanted& each : wanted) requests.push_back(each.request());
    lane.consumer->submit(requests, lane.caller.stream());
    if (round % 2 == 0) setup.engine.close();
    lane.consumer->close();
    lane.consumer->close();
    CHECK(error_of([&] { lane.wait(29); }).code() == ErrorCode::kCancelled);
    CHECK(error_of([&] { lane.consumer->submit(requests, lane.caller.stream()); }).code() ==
          ErrorCode::kCancelled);
  }
  CHECK(threads_become(threads));
}

TEST_CASE("scratch that cannot be cut, and a device without kernels, open no consumer") {
  const Accounts accounts;
  Setup setup;
  const auto open = [&](std::size_t scratch_bytes) {
    const Consumer made(setup.engine, 0, {0, scratch_bytes, 0, 0, cint8_vector_quant});
  };
  CHECK(error_of([&] { open(2047); }).code() == ErrorCode::kInvalidArgument);
  setup.engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 1));
  const OnlyKernelImages none({});
  const auto second = [&] { const Consumer made(setup.engine, 1, {0, kScratch, 0, 0, cint8_vector_quant}); };
  CHECK(error_of(second).code() == ErrorCode::kDriver);
}

}  // namespace pyint8::testing
