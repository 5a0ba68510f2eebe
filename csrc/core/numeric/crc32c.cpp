#include "numeric/crc32c.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace pyint8 {
namespace {

// A checksum is a polynomial over GF(2), modulo this one; bit 31 has the coefficient of x^0.
constexpr std::uint32_t kPolynomial = 0x82f63b78;
constexpr std::uint32_t kOne = std::uint32_t{1} << 31;
// Below that many bytes, three parts cost more than they save.
constexpr std::size_t kMinForThree = 1024;

constexpr std::uint32_t times_x(std::uint32_t value) {
  return (value & 1) != 0 ? (value >> 1) ^ kPolynomial : value >> 1;
}

constexpr std::uint32_t product(std::uint32_t a, std::uint32_t b) {
  std::uint32_t sum = 0;
  for (std::uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) sum ^= b;
    b = times_x(b);
  }
  return sum;
}

// x^(8 * 2^i): a shift by 2^i bytes.
constexpr auto kShifts = [] {
  std::array<std::uint32_t, 64> shifts{};
  std::uint32_t shift = kOne >> 8;
  for (std::uint32_t& each : shifts) {
    each = shift;
    shift = product(shift, shift);
  }
  return shifts;
}();

constexpr auto kTable = [] {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t byte = 0; byte < table.size(); ++byte) {
    table[byte] = byte;
    for (int bit = 0; bit < 8; ++bit) table[byte] = times_x(table[byte]);
  }
  return table;
}();

std::uint32_t step(std::uint32_t state, std::byte byte) {
  return kTable[(state ^ std::to_integer<std::uint32_t>(byte)) & 0xff] ^ (state >> 8);
}

std::uint32_t by_table(std::uint32_t state, std::span<const std::byte> bytes) {
  for (const std::byte byte : bytes) state = step(state, byte);
  return state;
}

std::uint64_t word_at(const std::byte* at) {
  std::uint64_t word = 0;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

// The CPU's instruction, and whether it has it. As assembly: compilers disagree on which of their options
// allows it.
#if defined(__x86_64__)
#define PYINT8_CRC_INSTRUCTION
inline std::uint64_t step_word(std::uint64_t state, std::uint64_t word) {
  asm("crc32q %1, %0" : "+r"(state) : "r"(word));
  return state;
}
bool has_instruction() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_SSE4_2) != 0;
}
#elif defined(__aarch64__)
#define PYINT8_CRC_INSTRUCTION
inline std::uint64_t step_word(std::uint64_t state, std::uint64_t word) {
  asm(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(state) : "r"(word));
  return state;
}
bool has_instruction() {
  return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}
#endif

#ifdef PYINT8_CRC_INSTRUCTION

// Of three parts at once: the instruction takes three cycles, and a new one can begin in each.
std::uint32_t by_thirds(std::uint32_t state, const std::byte* bytes, std::size_t third) {
  std::uint64_t first = state;
  std::uint64_t second = 0;
  std::uint64_t last = 0;
  for (const std::byte* end = bytes + third; bytes < end; bytes += sizeof(std::uint64_t)) {
    first = step_word(first, word_at(bytes));
    second = step_word(second, word_at(bytes + third));
    last = step_word(last, word_at(bytes + 2 * third));
  }
  return crc32c_shift(static_cast<std::uint32_t>(first), 2 * third) ^
         crc32c_shift(static_cast<std::uint32_t>(second), third) ^ static_cast<std::uint32_t>(last);
}

std::uint32_t by_instruction(std::uint32_t state, std::span<const std::byte> bytes) {
  if (bytes.size() >= kMinForThree) {
    const std::size_t third = bytes.size() / 3 & ~(sizeof(std::uint64_t) - 1);
    state = by_thirds(state, bytes.data(), third);
    bytes = bytes.subspan(3 * third);
  }
  std::uint64_t wide = state;
  for (; bytes.size() >= sizeof(std::uint64_t); bytes = bytes.subspan(sizeof(std::uint64_t))) {
    wide = step_word(wide, word_at(bytes.data()));
  }
  return by_table(static_cast<std::uint32_t>(wide), bytes);
}

std::uint32_t state_after(std::uint32_t state, std::span<const std::byte> bytes) {
  static const bool fast = has_instruction();
  return fast ? by_instruction(state, bytes) : by_table(state, bytes);
}

#else

std::uint32_t state_after(std::uint32_t state, std::span<const std::byte> bytes) {
  return by_table(state, bytes);
}

#endif

}  // namespace

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before) {
  return ~state_after(~before, bytes);
}

std::uint32_t crc32c_shift(std::uint32_t checksum, std::uint64_t behind) {
  for (const std::uint32_t shift : kShifts) {
    if (behind == 0) break;
    if ((behind & 1) != 0) checksum = product(checksum, shift);
    behind >>= 1;
  }
  return checksum;
}

}  // namespace pyint8
