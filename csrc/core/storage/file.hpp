// An owned, read-only file descriptor.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "storage/source.hpp"

namespace pyint8 {

// Distinguishes states of a file, except those within one tick of the file system's clock.
struct FileStamp {
  std::uint64_t device;
  std::uint64_t inode;
  std::int64_t size;
  std::int64_t mtime_ns;

  bool operator==(const FileStamp&) const = default;
};

// A descriptor that is closed with the object; negative for none.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int number() const { return number_; }

 private:
  int number_;
};

class File final : public Source {
 public:
  // Opens `path`. With `direct`, also opens a twin that bypasses the page cache, for what is not in it; where
  // the file system refuses (EINVAL on network and overlay file systems) reads silently use the first
  // descriptor. Throws kChanged if the file is in another state than `expected`.
  File(std::string path, bool direct, const std::optional<FileStamp>& expected = std::nullopt);
  ~File() override;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Retries short reads and EINTR. A direct read wants `out`, `offset` and `capacity` aligned to
  // kDirectAlignment; others go the buffered way.
  void read_at(std::byte* out, std::size_t needed, std::size_t capacity, std::uint64_t offset) const override;
  // Of the file that was opened, even if it was renamed or removed since.
  void require_unchanged() const override;

  const std::string& path() const { return path_; }
  const FileStamp& stamp() const { return stamp_; }
  bool direct() const { return direct_.load(std::memory_order_relaxed) >= 0; }

 private:
  void require(int descriptor, const FileStamp& expected) const;
  void map_for_direct_reads();
  // `missing` bytes of a read are not there, from `wanted` on.
  [[noreturn]] void throw_truncated(std::uint64_t wanted, std::size_t missing) const;
  bool is_cached(std::uint64_t offset, std::size_t nbytes) const;
  int descriptor_for(const std::byte* out, std::size_t capacity, std::uint64_t offset) const;

  std::string path_;
  Descriptor buffered_;
  Descriptor twin_;  // only `direct_` says whether to use it
  FileStamp stamp_;
  void* map_ = nullptr;  // the whole file, never touched: for mincore, which says what of it is cached
  std::uint64_t mapped_ = 0;
  mutable std::atomic<int> direct_;  // the twin's descriptor, or -1 once the file system refused a read
};

}  // namespace pyint8
