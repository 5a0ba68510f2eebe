// Files of which only so many are open at a time, however many shards there are.
//
// A file is opened when it is added, so that what is wrong with it is said then. When others need its
// descriptor it is closed, unless it is being read, those first that were not read for longest; the next read
// opens it again, and finds it in the state it had.
#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "storage/file.hpp"

namespace pyint8 {

// `most`, or fewer, so that half of the descriptors that this process may still have are left to others; a
// file may take two.
std::size_t descriptors_to_take(std::size_t most);

// Thread-safe.
class OpenFiles {
 public:
  explicit OpenFiles(std::size_t most) : most_(most) {}
  OpenFiles(const OpenFiles&) = delete;
  OpenFiles& operator=(const OpenFiles&) = delete;

  // See File. This outlives what it returns.
  std::unique_ptr<Source> open(std::string path, bool direct, const std::optional<FileStamp>& expected);

 private:
  class Entry;
  using Lease = std::shared_ptr<const File>;

  Lease lease(const Entry& entry);
  Lease open_again(const Entry& entry);
  // With the lock held: closes files that nobody reads, until so many are open.
  void close_until(std::size_t most);

  const std::size_t most_;
  std::mutex mutex_;
  std::list<const Entry*> open_;  // the one that was read last first
};

}  // namespace pyint8
