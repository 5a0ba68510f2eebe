#include <algorithm>
#include <thread>

#include "cuda_support.hpp"
#include "device/device_host.hpp"
#include "engine_support.hpp"
#include "numeric/crc32c.hpp"
#include "transfer/checksum.hpp"

namespace pyint8::testing {
namespace {

constexpr std::uint64_t kOffset = 1000;

// Reads `nbytes` at kOffset of the first file in parts of `step`; the error of the wait for all, if any.
std::optional<Error> read_in_parts(const Checkpoint& checkpoint, bool on_gpu, std::uint32_t expected,
                                   Bytes& to, std::size_t step) {
  std::optional<Caller> caller;
  if (on_gpu) caller.emplace(0);
  const StreamHandle stream = on_gpu ? caller->stream() : 0;
  Engine engine({.threads = 4, .slot_bytes = 8192});
  checkpoint.open(engine);
  if (on_gpu) {
    engine.add_device(std::make_unique<CudaDevice>(fake_driver(), 0));
  } else {
    engine.add_device(std::make_unique<HostDevice>(4));
  }
  const std::uint32_t number =
      engine.add_checksum(checkpoint.files[0].path(), {0, kOffset, to.size()}, expected);
  std::vector<Read> reads;
  for (std::size_t at = 0; at < to.size(); at += step) {
    const std::size_t nbytes = std::min(step, to.size() - at);
    reads.push_back({{0, kOffset + at, nbytes, number}, reinterpret_cast<Address>(to.data() + at)});
  }
  std::ranges::reverse(reads);
  const Ticket first = engine.submit(0, reads, stream, false);
  try {
    for (std::size_t i = 0; i < reads.size(); ++i) wait_for(engine, first + i, stream);
  } catch (const Error& error) {
    return error;
  }
  if (on_gpu) caller->synchronize();
  return std::nullopt;
}

}  // namespace

TEST_CASE("a tensor that arrives in parts, in any order, from several threads") {
  const Bytes bytes = random_bytes(100000, 1);
  constexpr std::size_t kParts = 40;
  constexpr std::size_t kStep = 2500;
  Checksum checksum("a file", 7, bytes.size(), crc32c(bytes));
  std::vector<std::thread> threads;
  std::atomic<std::size_t> next{0};
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (std::size_t part = next++; part < kParts; part = next++) {
        const std::size_t at = (part * 17 % kParts) * kStep;
        checksum.add(7 + at, std::span(bytes).subspan(at, kStep));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(next >= kParts);
}

TEST_CASE("the last part says what is wrong, and where") {
  const Bytes bytes = random_bytes(300, 1);
  Checksum checksum("a file", 7, bytes.size(), crc32c(bytes) ^ 1);
  checksum.add(107, std::span(bytes).subspan(100));
  const Error error = error_of([&] { checksum.add(7, std::span(bytes).first(100)); });
  CHECK(error.code() == ErrorCode::kDamaged);
  CHECK(error.path() == "a file");
  CHECK(error.offset() == 7);
  CHECK(contains(error.message(), "CRC-32C"));
}

TEST_CASE("ranks' sums of their parts, and of what all read, make the whole") {
  const Bytes bytes = random_bytes(1000, 1);
  const auto parts = std::span(bytes);
  Checksum whole("", 7, bytes.size(), std::nullopt);
  Checksum first("", 7, bytes.size(), std::nullopt);
  Checksum second("", 7, bytes.size(), std::nullopt);
  first.add(7, parts.first(480));
  second.add(487, parts.subspan(480, 480));
  whole.add(967, parts.subspan(960));
  CHECK(first.sum().nbytes + second.sum().nbytes + whole.sum().nbytes == bytes.size());
  CHECK((first.sum().value ^ second.sum().value ^ whole.sum().value) == crc32c(bytes));
}

TEST_CASE("the engine checks what it reads, on its way to memory of any kind") {
  const Checkpoint checkpoint({200001});
  for (const bool on_gpu : {false, true}) {
    for (const std::size_t step : {100000, 5000, 977}) {
      Bytes to(100000);
      const auto whole = std::span(checkpoint.contents[0]).subspan(kOffset, to.size());
      CHECK(!read_in_parts(checkpoint, on_gpu, crc32c(whole), to, step));
      CHECK(std::ranges::equal(to, whole));
      const auto error = read_in_parts(checkpoint, on_gpu, ~crc32c(whole), to, step);
      REQUIRE(error);
      CHECK(error->code() == ErrorCode::kDamaged);
      CHECK(error->path() == checkpoint.files[0].path());
      CHECK(error->offset() == kOffset);
    }
  }
}

}  // namespace pyint8::testing
