// CRC-32C (Castagnoli's polynomial), which storage services, TensorFlow and Zarr use: fast, and good for what
// disks, networks and memory do to bytes, not for what people do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pyint8 {

// Of `bytes`; with `before`, of bytes that have that checksum, and these behind them.
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before = 0);

// What `checksum` adds to that of a whole, when `behind` more bytes follow: the checksums of parts that make
// a whole, each shifted so, give that of the whole by XOR, in any order.
std::uint32_t crc32c_shift(std::uint32_t checksum, std::uint64_t behind);

}  // namespace pyint8
