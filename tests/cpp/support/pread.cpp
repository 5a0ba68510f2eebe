#include "pread.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>

namespace pyint8::testing {
namespace {

std::atomic<std::size_t> direct{0}, all{0};

// This machine's pages are smaller than those that a test pretends, so a mapping may begin inside one.
bool is_inside_a_page(const void* address) {
  static const auto first = reinterpret_cast<std::uintptr_t>(address);
  return (reinterpret_cast<std::uintptr_t>(address) - first) % page_bytes != 0;
}

}  // namespace

std::size_t direct_reads() {
  return direct;
}
std::size_t all_reads() {
  return all;
}

}  // namespace pyint8::testing

extern "C" int mincore(void* address, std::size_t nbytes, unsigned char* pages) noexcept {
  using namespace pyint8::testing;
  static const auto real = reinterpret_cast<decltype(&mincore)>(::dlsym(RTLD_NEXT, "mincore"));
  if (page_bytes == 4096) {
    if (const int failed = real(address, nbytes, pages)) return failed;
  } else if (is_inside_a_page(address)) {
    errno = EINVAL;
    return -1;
  }
  for (std::size_t page = 0; page * page_bytes < nbytes; ++page) pages[page] = page < cached_pages ? 1 : 0;
  return 0;
}

extern "C" long sysconf(int name) noexcept {
  using namespace pyint8::testing;
  static const auto real = reinterpret_cast<decltype(&sysconf)>(::dlsym(RTLD_NEXT, "sysconf"));
  return name == _SC_PAGESIZE ? static_cast<long>(page_bytes) : real(name);
}

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                              void* argument) noexcept {
  using namespace pyint8::testing;
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(::dlsym(RTLD_NEXT, "pthread_create"));
  if (threads_left == 0) return EAGAIN;
  if (threads_left > 0) --threads_left;
  return real(thread, attributes, start, argument);
}

extern "C" int open(const char* path, int flags, ...) {
  using namespace pyint8::testing;
  static const auto real = reinterpret_cast<decltype(&open)>(::dlsym(RTLD_NEXT, "open"));
  std::va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if (interrupted_opens > 0) {
    --interrupted_opens;
    errno = EINTR;
    return -1;
  }
  if ((flags & O_DIRECT) != 0 && before_direct_open) before_direct_open();
  return real(path, flags, mode);
}

extern "C" ssize_t pread(int descriptor, void* out, size_t nbytes, off_t offset) {
  using namespace pyint8::testing;
  static const auto real = reinterpret_cast<decltype(&pread)>(::dlsym(RTLD_NEXT, "pread"));
  ++all;
  if (read_milliseconds > 0) ::usleep(1000 * read_milliseconds);
  if ((::fcntl(descriptor, F_GETFL) & O_DIRECT) != 0) ++direct;
  if (reads_left >= 0 && reads_left-- == 0) {
    errno = read_failure;
    return -1;
  }
  nbytes = std::min<std::size_t>(nbytes, most_at_once);
  if (fates.empty()) return real(descriptor, out, nbytes, offset);
  const Fate fate = fates.front();
  fates.pop_front();
  if (fate.error == 0) return real(descriptor, out, std::min(nbytes, fate.most), offset);
  errno = fate.error;
  return -1;
}
