// Files full of random bytes, and reads of them that know what they should have brought.
#pragma once

#include <deque>

#include "support.hpp"
#include "transfer/engine.hpp"

namespace pyint8::testing {

inline constexpr std::chrono::seconds kPatience{20};  // then it is a deadlock

struct Checkpoint {
  explicit Checkpoint(const std::vector<std::size_t>& sizes);
  // Adds the files to an engine, in order.
  void open(Engine& engine) const;

  std::vector<Bytes> contents;
  std::deque<TempFile> files;
};

// Reads much as a checkpoint is read: runs of small neighbours, large ones in several pieces, some empty.
class Reads {
 public:
  Reads(const Checkpoint& checkpoint, Random& random, std::size_t count, std::size_t largest);

  std::span<const Read> all() const { return reads_; }
  std::size_t nbytes() const;
  // Whether a destination, or each, holds its bytes of the file and nothing about it was touched.
  bool arrived(std::size_t index) const;
  bool arrived() const;

 private:
  const Checkpoint& checkpoint_;
  std::vector<Read> reads_;
  std::vector<Bytes> destinations_;
};

// Fails the test if the ticket does not come.
void wait_for(Engine& engine, Ticket ticket, StreamHandle stream);

}  // namespace pyint8::testing
