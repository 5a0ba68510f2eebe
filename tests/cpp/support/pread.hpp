// Stands before libc's pread, mincore, sysconf, open and pthread_create in the tests: to make these fail, to
// see which go past the page cache, to say what is in it, and to do something between the two times that a
// file is opened.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <functional>

namespace pyint8::testing {

// What happens to a call: it fails with an errno, or reads at most so many bytes.
struct Fate {
  int error;
  std::size_t most;
};

// Of the next calls on this thread.
inline thread_local std::deque<Fate> fates;

// So many more reads of the whole process succeed before one fails; negative for all. And how it does.
inline std::atomic<int> reads_left = -1;
inline std::atomic<int> read_failure = 0;

// What a read gives at most, as on a network.
inline std::atomic<std::size_t> most_at_once = static_cast<std::size_t>(-1);

// How long each read takes, as on slow storage.
inline std::atomic<unsigned> read_milliseconds = 0;

// How many more threads the operating system starts; negative for as many as are asked for.
inline std::atomic<int> threads_left = -1;

// What mincore answers: so many pages of a range that is asked about are in the page cache.
inline std::atomic<std::size_t> cached_pages = 0;

// Of the machine, as sysconf tells it; mincore then takes whole pages only, counted from the first address it
// is asked about.
inline std::atomic<std::size_t> page_bytes = 4096;

// So many of the next opens on this thread are interrupted by a signal.
inline thread_local std::size_t interrupted_opens = 0;

// Called before a file is opened for direct reads, on this thread.
inline thread_local std::function<void()> before_direct_open;

// Calls so far of the whole process: through O_DIRECT, and in all.
std::size_t direct_reads();
std::size_t all_reads();

}  // namespace pyint8::testing
