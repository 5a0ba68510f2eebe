#include "transfer/checksum.hpp"

#include <array>
#include <cstdio>

#include "error.hpp"
#include "numeric/crc32c.hpp"

namespace pyint8 {
namespace {

std::string hexadecimal(std::uint32_t value) {
  std::array<char, 9> text{};
  std::snprintf(text.data(), text.size(), "%08x", value);
  return text.data();
}

}  // namespace

void Checksum::add(std::uint64_t offset, std::span<const std::byte> bytes) {
  const std::uint64_t behind = offset_ + nbytes_ - offset - bytes.size();
  sum_.fetch_xor(crc32c_shift(crc32c(bytes), behind));
  if (left_.fetch_sub(bytes.size()) != bytes.size()) return;
  const std::uint32_t found = sum_;
  if (!expected_ || found == *expected_) return;
  throw Error(ErrorCode::kDamaged,
              "its bytes have the CRC-32C " + hexadecimal(found) + ", and had " + hexadecimal(*expected_))
      .at(path_, offset_);
}

Checksum::Sum Checksum::sum() const {
  // First: what is added meanwhile is then not taken for complete.
  const std::uint64_t nbytes = nbytes_ - left_;
  return {sum_, nbytes};
}

}  // namespace pyint8
