// Stands before libc's pread and mincore in the tests: to make reads fail, to see which go past the page
// cache, and to say what is in it.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>

namespace pyint8::testing {

// What happens to a call: it fails with an errno, or reads at most so many bytes.
struct Fate {
  int error;
  std::size_t most;
};

// Of the next calls on this thread.
inline thread_local std::deque<Fate> fates;

// What mincore answers: so many pages of a range that is asked about are in the page cache.
inline std::atomic<std::size_t> cached_pages = 0;

// Calls so far of the whole process: through O_DIRECT, and in all.
std::size_t direct_reads();
std::size_t all_reads();

}  // namespace pyint8::testing
