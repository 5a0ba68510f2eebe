// The checksum of a tensor that arrives in parts, in any order, from several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace pyint8 {

// Bytes of a file, and the CRC-32C that they had when they were written, if they are to be compared.
class Checksum {
 public:
  // Of some of the bytes: with what others have of them, by exclusive or, the CRC-32C of all.
  struct Sum {
    std::uint32_t value;
    std::uint64_t nbytes;
  };

  Checksum(std::string path, std::uint64_t offset, std::uint64_t nbytes,
           std::optional<std::uint32_t> expected)
      : path_(std::move(path)), offset_(offset), nbytes_(nbytes), expected_(expected), left_(nbytes) {}

  // Takes the bytes at `offset` of the file; each is given once. Throws kDamaged with the last of them, if
  // the whole is not what it was.
  void add(std::uint64_t offset, std::span<const std::byte> bytes);
  // Of what was given so far.
  Sum sum() const;

 private:
  const std::string path_;
  const std::uint64_t offset_;
  const std::uint64_t nbytes_;
  const std::optional<std::uint32_t> expected_;
  std::atomic<std::uint64_t> left_;  // bytes
  std::atomic<std::uint32_t> sum_ = 0;
};

}  // namespace pyint8
