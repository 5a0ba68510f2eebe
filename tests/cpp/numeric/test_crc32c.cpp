#include "numeric/crc32c.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

// Bit by bit, as the definition has it.
std::uint32_t plain(std::span<const std::byte> bytes) {
  std::uint32_t state = 0xffffffff;
  for (const std::byte byte : bytes) {
    state ^= std::to_integer<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) state = (state & 1) != 0 ? (state >> 1) ^ 0x82f63b78 : state >> 1;
  }
  return ~state;
}

std::uint32_t of_text(const std::string& text) {
  return crc32c(std::as_bytes(std::span(text)));
}

}  // namespace

TEST_CASE("the checksums that are published: of RFC 3720, and the usual check") {
  CHECK(of_text("123456789") == 0xe3069283);
  CHECK(of_text(std::string(32, '\0')) == 0x8a9136aa);
  CHECK(of_text(std::string(32, '\xff')) == 0x62a8ab43);
  CHECK(of_text("") == 0);
}

TEST_CASE("whatever the length and the alignment") {
  const Bytes bytes = random_bytes(5000, 1);
  Random random(2);
  for (std::size_t nbytes = 0; nbytes < 100; ++nbytes) {
    REQUIRE(crc32c(std::span(bytes).subspan(3, nbytes)) == plain(std::span(bytes).subspan(3, nbytes)));
  }
  for (int time = 0; time < 300; ++time) {
    const std::size_t from = pick(random, 0, bytes.size());
    const auto part = std::span(bytes).subspan(from, pick(random, 0, bytes.size() - from));
    REQUIRE(crc32c(part) == plain(part));
  }
}

TEST_CASE("goes on where it was") {
  const Bytes bytes = random_bytes(4000, 3);
  const std::uint32_t whole = crc32c(bytes);
  for (const std::size_t first : {0, 1, 7, 1024, 3999, 4000}) {
    CHECK(crc32c(std::span(bytes).subspan(first), crc32c(std::span(bytes).first(first))) == whole);
  }
}

TEST_CASE("parts give the whole") {
  const Bytes bytes = random_bytes(200001, 4);
  Random random(5);
  for (int time = 0; time < 20; ++time) {
    std::uint32_t sum = 0;
    for (std::size_t done = 0; done < bytes.size();) {
      const std::size_t nbytes = pick(random, 1, bytes.size() - done);
      const std::uint64_t behind = bytes.size() - done - nbytes;
      sum ^= crc32c_shift(crc32c(std::span(bytes).subspan(done, nbytes)), behind);
      done += nbytes;
    }
    REQUIRE(sum == crc32c(bytes));
  }
}

TEST_CASE("by more bytes than memory holds, as by zeros in steps") {
  const std::uint64_t far = (std::uint64_t{1} << 40) + 12345;
  CHECK(crc32c_shift(crc32c_shift(0xdeadbeef, far), far) == crc32c_shift(0xdeadbeef, 2 * far));
  CHECK(crc32c_shift(0xdeadbeef, 0) == 0xdeadbeef);
  std::uint32_t by_ones = 0xdeadbeef;
  for (int time = 0; time < 1000; ++time) by_ones = crc32c_shift(by_ones, 1);
  CHECK(by_ones == crc32c_shift(0xdeadbeef, 1000));
}

}  // namespace pyint8::testing
