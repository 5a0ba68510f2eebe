// An owned, read-only file descriptor.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "storage/source.hpp"

namespace pyint8 {

class File final : public Source {
 public:
  // Opens `path`. With `direct`, also opens a twin that bypasses the page cache, for what is not in it; where
  // the file system refuses (EINVAL on network and overlay file systems) reads silently use the first
  // descriptor.
  File(std::string path, bool direct);
  ~File() override;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Retries short reads and EINTR. A direct read wants `out`, `offset` and `capacity` aligned to
  // kDirectAlignment; others go the buffered way.
  void read_at(std::byte* out, std::size_t needed, std::size_t capacity, std::uint64_t offset) const override;

  const std::string& path() const { return path_; }
  bool direct() const { return direct_.load(std::memory_order_relaxed) >= 0; }

 private:
  // `missing` bytes of a read are not there, from `wanted` on.
  [[noreturn]] void throw_truncated(std::uint64_t wanted, std::size_t missing) const;
  bool is_cached(std::uint64_t offset, std::size_t nbytes) const;
  int descriptor_for(const std::byte* out, std::size_t capacity, std::uint64_t offset) const;

  std::string path_;
  int buffered_ = -1;
  void* map_ = nullptr;  // the whole file, never touched: for mincore, which says what of it is cached
  std::uint64_t mapped_ = 0;
  int twin_ = -1;                    // owned for good; `direct_` is only whether to use it
  mutable std::atomic<int> direct_;  // the twin's descriptor, or -1 once the file system refused a read
};

}  // namespace pyint8
