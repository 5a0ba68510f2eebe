// What becomes of tensors, and in what order with the caller's work, over the fake driver: which counts as a
// violation whatever two streams do to the same memory in no order, scratch included.
#include <algorithm>
#include <array>
#include <atomic>
#include <thread>

#include "consumer_support.hpp"
#include "device/device_host.hpp"
#include "fake_cuda_kernels.hpp"

namespace pyint8::testing {
namespace {

// Submits tensors in many batches and waits in a random order meanwhile; looks at each on its caller's stream
// once that waits for it.
class Mix {
 public:
  Mix(Tensors& tensors, Gpus& gpus, Random& random)
      : tensors_(tensors),
        gpus_(gpus),
        random_(random),
        right_(tensors.size()),
        submitted_(gpus.callers.size()) {}

  bool run() {
    while (next_ < tensors_.size() || !waiting_.empty()) {
      if (next_ < tensors_.size() && (waiting_.empty() || pick(random_, 0, 2) == 0)) {
        submit();
      } else {
        wait();
      }
    }
    gpus_.synchronize();
    return std::ranges::all_of(right_, [](std::uint8_t right) { return right == 1; });
  }

  bool all_done() {
    for (std::size_t lane = 0; lane < submitted_.size(); ++lane) {
      if (gpus_.consumers[lane].done() != submitted_[lane]) return false;
    }
    return true;
  }

 private:
  struct Taken {
    std::size_t tensor;
    std::uint32_t lane;
    Ticket ticket;
  };

  void submit() {
    const auto lane = static_cast<std::uint32_t>(pick(random_, 0, submitted_.size() - 1));
    const std::size_t count = std::min(pick(random_, 0, 12), tensors_.size() - next_);
    std::vector<Tensor*> batch;
    for (std::size_t i = 0; i < count; ++i) batch.push_back(&tensors_[next_ + i]);
    const Ticket first = gpus_.submit(lane, batch, pick(random_, 0, 3) == 0);
    REQUIRE(first == submitted_[lane]);
    for (std::size_t i = 0; i < count; ++i) waiting_.push_back({next_ + i, lane, first + i});
    next_ += count;
    submitted_[lane] += count;
  }

  void wait() {
    std::swap(waiting_[pick(random_, 0, waiting_.size() - 1)], waiting_.back());
    const auto [tensor, lane, ticket] = waiting_.back();
    waiting_.pop_back();
    REQUIRE(gpus_.wait(lane, ticket) > ticket);
    gpus_.callers[lane].then([this, tensor] { right_[tensor] = tensors_[tensor].came() ? 1 : 0; });
  }

  Tensors& tensors_;
  Gpus& gpus_;
  Random& random_;
  std::vector<std::uint8_t> right_;  // by tensor
  std::vector<Ticket> submitted_;    // by lane: how many
  std::vector<Taken> waiting_;
  std::size_t next_ = 0;
};

// A quantizer that holds its stream up first, so that bands are long in scratch and copies come before them.
void slowly(const void* half, void* codes, void* scales, float threshold, int rows, int columns,
            StreamHandle stream) {
  const auto pause = [](void*) { std::this_thread::sleep_for(std::chrono::microseconds(300)); };
  cuLaunchHostFunc(reinterpret_cast<CUstream_st*>(stream), pause, nullptr);
  cint8_vector_quant(half, codes, scales, threshold, rows, columns, stream);
}

void at_once(const void* half, void* codes, void* scales, float, int rows, int columns, StreamHandle) {
  fake_cuda::quantize_rows(half, codes, scales, rows, columns);
}

std::vector<int> rows_of_calls;

void counted(const void* half, void* codes, void* scales, float threshold, int rows, int columns,
             StreamHandle stream) {
  rows_of_calls.push_back(rows);  // by the only consumer
  cint8_vector_quant(half, codes, scales, threshold, rows, columns, stream);
}

// Rows of a weight as requests of their own, which have landed in `memory`.
std::vector<Request> parts_of(const Request& whole, std::size_t count, Gpus& gpus, Bytes& memory) {
  const auto& range = std::get<Range>(whole.from);
  std::vector<Request> parts(count, whole);
  for (std::size_t part = 0; part < count; ++part) {
    const std::size_t rows = whole.rows / count, row = part * rows;
    const std::size_t row_bytes = whole.columns * size_of(whole.stored);
    const Read read{{range.file, range.offset + row * row_bytes, rows * row_bytes},
                    reinterpret_cast<Address>(memory.data()) + row * row_bytes};
    const Ticket ticket = gpus.engine.submit(0, {&read, 1}, gpus.callers[0].stream(), false);
    REQUIRE(gpus.engine.is_on_its_way(ticket, std::chrono::seconds(60)));
    auto& to = std::get<ToInt8>(parts[part].to);
    to.codes += row * whole.columns;
    to.scales += row * sizeof(float);
    parts[part].marks += row;
    parts[part].rows = rows;
    parts[part].from = Landed{ticket, read.to};
  }
  return parts;
}

// Bytes that are zero; says in which order they were asked for, the first of them once it is let to.
class Ordered final : public Source {
 public:
  void read_at(std::byte* out, std::size_t needed, std::size_t, std::uint64_t offset) const override {
    begun = true;
    while (!open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::fill_n(out, needed, std::byte{0});
    offsets.push_back(offset);  // by the only worker
  }
  void require_unchanged() const override {}

  std::atomic<bool> open = false;
  mutable std::atomic<bool> begun = false;
  mutable std::vector<std::uint64_t> offsets;
};

}  // namespace

TEST_CASE("every kind of request, every dtype, in one band and in many") {
  Random random(1);
  for (const auto& [rows, columns] : {std::pair{1, 1}, {1, 64}, {611, 3}, {33, 61}}) {
    CAPTURE(rows);
    CAPTURE(columns);
    const Accounts accounts;
    Tensors tensors(every_wish(rows, columns), random);
    Callers callers(1);
    Gpus gpus(tensors, callers, kLeast, kOptions);
    const Ticket first = gpus.submit(0, tensors);
    CHECK(gpus.wait(0, first + tensors.size() - 1) == tensors.size());
    gpus.synchronize();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      CAPTURE(i);
      CHECK(tensors[i].came());
    }
  }
}

TEST_CASE("any mix of requests is byte-exact, whatever the GPUs, scratch, threads and slots") {
  Random random(2);
  for (const int gpu_count : {1, 3}) {
    for (const std::size_t scratch_bytes : {kLeast, 3 * kLeast + 1000, std::size_t{1} << 17}) {
      for (const std::size_t threads : {1, 3}) {
        for (const std::size_t slots_per_thread : {1, 3}) {
          CAPTURE(gpu_count);
          CAPTURE(scratch_bytes);
          CAPTURE(threads);
          CAPTURE(slots_per_thread);
          const Accounts accounts;
          Tensors tensors(random_wishes(random, 100, scratch_bytes / kLeast * kScratchAlignment), random);
          Callers callers(gpu_count);
          Gpus gpus(tensors, callers, scratch_bytes, {threads, slots_per_thread, kSlot});
          Mix mix(tensors, gpus, random);
          CHECK(mix.run());
          CHECK(mix.all_done());
        }
      }
    }
  }
}

TEST_CASE("scratch is not written while a kernel that comes late still reads it") {
  Random random(3);
  for (const bool landed : {false, true}) {
    const Accounts accounts;
    Wish wish{Kind::kInt8, ElementType::kBFloat16, ElementType::kBFloat16, 300, 60, landed};
    Tensors tensors(std::vector<Wish>(6, wish), random);
    Callers callers(1);
    Gpus gpus(tensors, callers, kLeast, kOptions, slowly);
    gpus.submit(0, tensors);
    gpus.wait(0, tensors.size() - 1);
    gpus.synchronize();
    CHECK(tensors.came());
    CHECK(fake_cuda_calls("cint8_vector_quant") == 6 * 150);  // two rows a band
  }
}

TEST_CASE("destinations are not written before what the caller's stream still does with them") {
  const Accounts accounts;
  Random random(4);
  Tensors tensors(every_wish(20, 30), random);
  std::atomic<bool> untouched = false;
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  callers[0].then([&] {
    soon();
    untouched = tensors.are_untouched();
  });
  gpus.submit(0, tensors);
  gpus.wait(0, tensors.size() - 1);
  gpus.synchronize();
  CHECK(untouched);
  CHECK(tensors.came());
}

TEST_CASE("a later submission waits for its own caller's stream too") {
  const Accounts accounts;
  Random random(5);
  Tensors tensors(every_wish(5, 7), random);
  bool untouched = false;
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  gpus.wait(0, gpus.submit(0, tensors[0]));
  Caller other(0);
  other.then([&] {
    soon();
    untouched = tensors[1].is_untouched();
  });
  const Request request = tensors[1].request(gpus.engine, 0, other.stream());
  gpus.wait(0, gpus.consumers[0].submit({&request, 1}, other.stream()));
  gpus.synchronize();
  CHECK(untouched);
  CHECK(tensors[1].came());
}

TEST_CASE("after a wait the caller's stream, and it alone, waits for the result") {
  const Accounts accounts;
  Random random(6);
  for (const Kind kind : {Kind::kInt8, Kind::kTransposed, Kind::kCast, Kind::kAsStored}) {
    Tensors tensors({{kind, ElementType::kFloat, ElementType::kHalf, 6, 40}}, random);
    std::atomic<bool> has_read = false, right = false;
    Callers callers(1);
    Gpus gpus(tensors, callers, kLeast, kOptions);
    Caller reader(0), bystander(0);
    Gate gate(callers[0]);  // keeps the copies from starting
    const Ticket ticket = gpus.submit(0, tensors);
    REQUIRE(gpus.consumers[0].wait(ticket, reader.stream(), kPatience) == 1);  // the host does not wait
    reader.then([&] {
      right = tensors.came();
      has_read = true;
    });
    bystander.synchronize();
    soon();
    CHECK_FALSE(has_read);
    gate.open();
    reader.synchronize();
    CHECK(right);
  }
}

TEST_CASE("a wait brings all that is done, and is over in time if nothing is") {
  const Accounts accounts;
  Random random(7);
  std::vector<Wish> wishes(5, Wish{Kind::kCast, ElementType::kFloat, ElementType::kHalf, 4, 16});
  wishes.push_back({Kind::kAsStored, {}, {}, 1, 40 * kSlot});
  Tensors tensors(wishes, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  CHECK(gpus.consumers[0].done() == 0);
  Gate gate(callers[0]);  // the last has more bytes than slots hold
  gpus.submit(0, tensors);
  CHECK(gpus.wait(0, 4) == 5);
  CHECK(gpus.wait(0, 0) == 5);  // again, and earlier
  CHECK(gpus.consumers[0].done() == 5);
  CHECK_FALSE(gpus.consumers[0].wait(5, callers[0].stream(), std::chrono::milliseconds(30)).has_value());
  gate.open();
  CHECK(gpus.wait(0, 5) == 6);
  gpus.synchronize();
  CHECK(tensors.came());
}

TEST_CASE("what landed in its place is only waited for") {
  const Accounts accounts;
  Random random(11);
  Tensors tensors({{Kind::kAsStored, {}, {}, 1, 3 * kSlot}}, random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  Request request = tensors[0].request(gpus.engine, 0, callers[0].stream());
  const Read read{std::get<Range>(request.from), std::get<ToValues>(request.to).values};
  request.from = Landed{gpus.engine.submit(0, {&read, 1}, callers[0].stream(), true), read.to};
  gpus.wait(0, gpus.consumers[0].submit({&request, 1}, callers[0].stream()));
  gpus.synchronize();
  CHECK(tensors.came());
  CHECK(fake_cuda_calls("cuMemcpyDtoDAsync_v2") == 0);
}

TEST_CASE("what has landed and lies together is quantized together, as far as there is room") {
  constexpr std::size_t kCount = 16, kRows = 4, kColumns = 32, kPart = kRows * kColumns * 2;
  for (const std::size_t together : {1, 3, 16, 40}) {
    CAPTURE(together);
    const Accounts accounts;
    Random random(13);
    Tensors tensors({{Kind::kInt8, ElementType::kBFloat16, ElementType::kBFloat16, kCount * kRows, kColumns}},
                    random);
    Bytes memory(tensors[0].stored().size());
    Callers callers(1);
    const std::size_t band = std::max(kScratchAlignment, together * kPart);
    Gpus gpus(tensors, callers, 8 * band, kOptions, counted);
    const StreamHandle stream = callers[0].stream();
    const Request whole = tensors[0].request(gpus.engine, 0, stream);
    std::vector<Request> parts = parts_of(whole, kCount, gpus, memory);
    rows_of_calls.clear();
    SUBCASE("in order") {
      gpus.wait(0, gpus.consumers[0].submit(parts, stream) + kCount - 1);
      CHECK(rows_of_calls.size() == (kCount * kPart + band - 1) / band);
    }
    SUBCASE("backwards, where nothing lies behind what was before") {
      std::ranges::reverse(parts);
      gpus.wait(0, gpus.consumers[0].submit(parts, stream) + kCount - 1);
      CHECK(rows_of_calls == std::vector<int>(kCount, kRows));
    }
    SUBCASE("in order, but for other scales") {
      std::swap(std::get<ToInt8>(parts[0].to).scales, std::get<ToInt8>(parts[1].to).scales);
      gpus.wait(0, gpus.consumers[0].submit(parts, stream) + kCount - 1);
      CHECK(rows_of_calls.at(0) == kRows);
      CHECK(rows_of_calls.at(1) == kRows);
      continue;  // which are not where they belong
    }
    gpus.synchronize();
    CHECK(tensors.came());
  }
}

TEST_CASE("a timeline has all that is done with a weight, whether it is joined with others or not") {
  constexpr std::size_t kCount = 8;
  for (const bool together : {false, true}) {
    CAPTURE(together);
    const Accounts accounts;
    Random random(14);
    Tensors tensors({{Kind::kInt8, ElementType::kHalf, ElementType::kHalf, kCount * 4, 32}}, random);
    Bytes memory(tensors[0].stored().size());
    Callers callers(1);
    EngineOptions options = kOptions;
    options.timeline = true;
    Gpus gpus(tensors, callers, 64 * kLeast, options, slowly);
    const Request whole = tensors[0].request(gpus.engine, 0, callers[0].stream());
    std::vector<Request> parts = parts_of(whole, kCount, gpus, memory);
    if (!together) std::ranges::reverse(parts);
    gpus.wait(0, gpus.consumers[0].submit(parts, callers[0].stream()) + kCount - 1);
    gpus.synchronize();
    CHECK(tensors.came());
    gpus.consumers[0].close();
    double seconds = 0;
    std::size_t nbytes = 0, count = 0;
    for (const Span& span : gpus.engine.timeline()->spans()) {
      if (span.doing != Doing::kQuantizing) continue;
      seconds += span.end - span.begin;
      nbytes += span.nbytes;
      ++count;
    }
    CHECK(nbytes == memory.size());
    CHECK(count == (together ? 1 : kCount));
    CHECK(seconds >= (together ? 1 : kCount) * 300e-6);  // that the quantizer takes
  }
}

TEST_CASE("what is wanted first is read ahead of what was asked for before, and stays in its own order") {
  constexpr std::size_t kTensor = 2 * kSlot;
  const Accounts accounts;
  Random random(12);
  Tensors none({}, random);
  Bytes early(kTensor), values(3 * kTensor);
  const auto source = std::make_shared<Ordered>();
  Callers callers(1);
  Gpus gpus(none, callers, kLeast, {.threads = 1, .slots_per_thread = 1, .slot_bytes = kSlot});
  const std::uint32_t file = gpus.engine.add_source(source);
  const StreamHandle stream = callers[0].stream();
  const auto at = [](Bytes& memory, std::size_t number) {
    return reinterpret_cast<Address>(memory.data()) + number * kTensor;
  };
  const auto wanted = [&](std::variant<Range, Landed> from, std::size_t number) {
    return Request{from, {}, 1, kTensor, ToValues{{}, at(values, number)}, 0};
  };
  const Read read{{file, 0, kTensor}, at(early, 0)};
  const Landed landed{gpus.engine.submit(0, {&read, 1}, stream, false), read.to};
  while (!source->begun) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const std::array first = {wanted(Range{file, kTensor, kTensor}, 0), wanted(landed, 1)};
  const std::array after = {wanted(Range{file, 2 * kTensor, kTensor}, 2)};
  gpus.consumers[0].submit(first, stream, true);
  const Ticket last = gpus.consumers[0].submit(after, stream, false);
  source->open = true;
  gpus.wait(0, last);
  gpus.synchronize();
  CHECK(source->offsets == std::vector<std::uint64_t>{0, 2 * kSlot, 3 * kSlot, kSlot, 4 * kSlot, 5 * kSlot});
}

TEST_CASE("nothing at all may be submitted") {
  const Accounts accounts;
  Random random(8);
  Tensors tensors(every_wish(2, 2), random);
  Callers callers(1);
  Gpus gpus(tensors, callers, kLeast, kOptions);
  CHECK(gpus.submit(0, std::span<Tensor* const>()) == 0);
  CHECK(gpus.submit(0, tensors[0]) == 0);
  CHECK(gpus.submit(0, std::span<Tensor* const>()) == 1);
  CHECK(gpus.wait(0, 0) == 1);
}

TEST_CASE("many small tensors are asked for together") {
  const Accounts accounts;
  Random random(9);
  Tensors tensors(std::vector<Wish>(64, {Kind::kCast, ElementType::kFloat, ElementType::kHalf, 2, 2}),
                  random);
  Callers callers(1);
  Gpus gpus(tensors, callers, std::size_t{1} << 17, kOptions);
  gpus.submit(0, tensors);
  gpus.wait(0, 63);
  gpus.synchronize();
  CHECK(tensors.came());
  CHECK(gpus.engine.stats().pieces == 1);
}

TEST_CASE("the host's memory has a consumer as well") {
  Random random(10);
  Tensors tensors(every_wish(33, 16), random);
  Bytes scratch(kLeast), transposed(33 * 16 * 2);
  Engine engine(kOptions);
  engine.add_file(tensors.path());
  engine.add_device(std::make_unique<HostDevice>(1));
  Consumer consumer(engine, 0,
                    {reinterpret_cast<Address>(scratch.data()), scratch.size(),
                     reinterpret_cast<Address>(transposed.data()), transposed.size(), at_once});
  std::vector<Request> requests;
  for (Tensor& tensor : tensors) requests.push_back(tensor.request(engine, 0, 0));
  const Ticket first = consumer.submit(requests, 0);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CAPTURE(i);
    REQUIRE(consumer.wait(first + i, 0, kPatience).has_value());
    CHECK(tensors[i].came());
  }
}

}  // namespace pyint8::testing
