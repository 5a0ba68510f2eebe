// Preloaded into a process, makes every file look as if it lay on a network file system: it cannot be opened
// for direct reads, cannot be mapped to be shared, and a read gives fewer bytes than were asked for.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>

namespace {

constexpr std::size_t kAtMost = 50001;  // bytes a read gives

template <class Function>
Function* genuine(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

int open_indirectly(const char* name, const char* path, int flags, std::va_list rest) {
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
  if ((flags & O_DIRECT) == 0) return genuine<int(const char*, int, ...)>(name)(path, flags, mode);
  errno = EINVAL;
  return -1;
}

void* map_privately(const char* name, void* at, std::size_t size, int access, int flags, int file,
                    off_t offset) {
  if (file < 0 || (flags & MAP_SHARED) == 0)
    return genuine<void*(void*, std::size_t, int, int, int, off_t)>(name)(at, size, access, flags, file,
                                                                          offset);
  errno = ENODEV;
  return MAP_FAILED;
}

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  std::va_list rest;
  va_start(rest, flags);
  const int file = open_indirectly("open", path, flags, rest);
  va_end(rest);
  return file;
}

int open64(const char* path, int flags, ...) {
  std::va_list rest;
  va_start(rest, flags);
  const int file = open_indirectly("open64", path, flags, rest);
  va_end(rest);
  return file;
}

ssize_t pread(int file, void* out, std::size_t count, off_t offset) {
  return genuine<ssize_t(int, void*, std::size_t, off_t)>("pread")(file, out, std::min(count, kAtMost),
                                                                   offset);
}

ssize_t pread64(int file, void* out, std::size_t count, off64_t offset) {
  return genuine<ssize_t(int, void*, std::size_t, off64_t)>("pread64")(file, out, std::min(count, kAtMost),
                                                                       offset);
}

void* mmap(void* at, std::size_t size, int access, int flags, int file, off_t offset) noexcept {
  return map_privately("mmap", at, size, access, flags, file, offset);
}

void* mmap64(void* at, std::size_t size, int access, int flags, int file, off64_t offset) noexcept {
  return map_privately("mmap64", at, size, access, flags, file, offset);
}

}  // extern "C"
