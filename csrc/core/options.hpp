// How the engine moves bytes. Python chooses the values; here they are only checked.
#pragma once

#include <cstddef>

namespace pyint8 {

struct EngineOptions {
  std::size_t threads = 1;           // workers that read
  std::size_t slots_per_thread = 2;  // pinned slots of each worker: one being filled, the others on their way
  std::size_t slot_bytes = 2 << 20;  // size of one slot, and of the largest single read
  bool direct_io = false;            // read past the page cache (O_DIRECT) where the file system can
  bool timeline = false;             // note what is done when (see timeline.hpp)

  std::size_t ring_bytes() const { return slots_per_thread * slot_bytes; }  // of one worker
};

// Throws kInvalidArgument naming the option, its value and its limits.
void validate(const EngineOptions& options);

}  // namespace pyint8
