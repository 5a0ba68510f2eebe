// Preloaded into a process, stands before the system's calls about files of one folder, before the start of
// threads and before torch's memory; counts them, and lets one of them fail.
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr int kShort = -1;  // instead of an error: a read or a write of half of what was asked for
constexpr std::size_t kNone = static_cast<std::size_t>(-1);
constexpr std::size_t kMostFiles = 4096;
constexpr std::size_t kMostCalls = 100000;

std::string folder;  // whose files these are about; none while it is empty
std::atomic<bool> is_counting = false;
std::atomic<std::size_t> made = 0;                       // calls since counting began
std::atomic<std::size_t> failing = 0;                    // the number of the one that fails, from 1 on
std::atomic<int> failure = 0;                            // an errno, or `kShort`
std::atomic<const char*> failed = nullptr;               // the name of the one that has
std::array<std::atomic<bool>, kMostFiles> is_inside;     // by descriptor
std::array<std::atomic<const char*>, kMostCalls> names;  // by number

bool has(int file) {
  return file >= 0 && static_cast<std::size_t>(file) < kMostFiles &&
         is_inside[static_cast<std::size_t>(file)];
}

bool has(const char* path) {
  return !folder.empty() && path != nullptr && std::strncmp(path, folder.c_str(), folder.size()) == 0;
}

bool has(int parent, const char* path) {
  return has(path) || (has(parent) && path != nullptr && path[0] != '/');
}

int note(int file, bool inside) {
  if (file >= 0 && static_cast<std::size_t>(file) < kMostFiles)
    is_inside[static_cast<std::size_t>(file)] = inside;
  return file;
}

// Whether this call is the one.
bool is_struck(const char* name) {
  if (!is_counting) return false;
  const std::size_t number = ++made;
  if (number < kMostCalls) names[number] = name;
  if (number != failing) return false;
  failed = name;
  return true;
}

bool fails(const char* name, bool is_watched) {
  if (!is_watched || !is_struck(name) || failure == kShort) return false;
  errno = failure;
  return true;
}

// How many bytes a call may move: fewer, or none and an error.
std::size_t most(const char* name, bool is_watched, std::size_t count) {
  if (!is_watched || !is_struck(name)) return count;
  if (failure == kShort) return std::max<std::size_t>(1, count / 2);
  errno = failure;
  return kNone;
}

mode_t mode_of(int flags, std::va_list rest) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
}

}  // namespace

#define GENUINE(name) \
  static const auto genuine = reinterpret_cast<decltype(&::name)>(::dlsym(RTLD_NEXT, #name))

// A call that fails by -1.
#define CALL(name, throws, is_watched, parameters, arguments) \
  int name parameters throws {                                \
    GENUINE(name);                                            \
    return fails(#name, is_watched) ? -1 : genuine arguments; \
  }

// A call that moves bytes, `Memory`, at an offset or where the file is.
#define MOVE(name, Memory)                                        \
  ssize_t name(int file, Memory bytes, std::size_t count) {       \
    GENUINE(name);                                                \
    const std::size_t at_most = most(#name, has(file), count);    \
    return at_most == kNone ? -1 : genuine(file, bytes, at_most); \
  }
#define MOVE_AT(name, Memory)                                             \
  ssize_t name(int file, Memory bytes, std::size_t count, off_t offset) { \
    GENUINE(name);                                                        \
    const std::size_t at_most = most(#name, has(file), count);            \
    return at_most == kNone ? -1 : genuine(file, bytes, at_most, offset); \
  }
#define OPEN(name)                                                                     \
  int name(const char* path, int flags, ...) {                                         \
    GENUINE(name);                                                                     \
    std::va_list rest;                                                                 \
    va_start(rest, flags);                                                             \
    const mode_t mode = mode_of(flags, rest);                                          \
    va_end(rest);                                                                      \
    return fails(#name, has(path)) ? -1 : note(genuine(path, flags, mode), has(path)); \
  }
#define OPENAT(name)                                                                     \
  int name(int parent, const char* path, int flags, ...) {                               \
    GENUINE(name);                                                                       \
    std::va_list rest;                                                                   \
    va_start(rest, flags);                                                               \
    const mode_t mode = mode_of(flags, rest);                                            \
    va_end(rest);                                                                        \
    const bool inside = has(parent, path);                                               \
    return fails(#name, inside) ? -1 : note(genuine(parent, path, flags, mode), inside); \
  }
#define MAP(name)                                                                                  \
  void* name(void* at, std::size_t size, int access, int flags, int file, off_t offset) noexcept { \
    GENUINE(name);                                                                                 \
    const bool is_watched = (flags & MAP_ANONYMOUS) == 0 && has(file);                             \
    return fails(#name, is_watched) ? MAP_FAILED : genuine(at, size, access, flags, file, offset); \
  }

extern "C" {

// What a test calls: which folder it is about, and which call fails, the `nth` from now (0: none), and how.
void faults_begin(const char* about, std::size_t nth, int error) {
  is_counting = false;
  folder = about;
  made = 0;
  failing = nth;
  failure = error;
  failed = nullptr;
  is_counting = true;
}
// How many calls there were.
std::size_t faults_end() {
  is_counting = false;
  return std::min<std::size_t>(made, kMostCalls - 1);
}
const char* faults_name(std::size_t number) {
  return names[number];
}
// Of the call that failed; null if none has.
const char* faults_failed() {
  return failed;
}

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

MOVE(read, void*)
MOVE(write, const void*)
MOVE_AT(pread, void*)
MOVE_AT(pread64, void*)
MOVE_AT(pwrite, const void*)
MOVE_AT(pwrite64, const void*)

MAP(mmap)
MAP(mmap64)

CALL(stat, noexcept, has(path), (const char* path, struct stat* to), (path, to))
CALL(stat64, noexcept, has(path), (const char* path, struct stat64* to), (path, to))
CALL(lstat, noexcept, has(path), (const char* path, struct stat* to), (path, to))
CALL(lstat64, noexcept, has(path), (const char* path, struct stat64* to), (path, to))
CALL(fstat, noexcept, has(file), (int file, struct stat* to), (file, to))
CALL(fstat64, noexcept, has(file), (int file, struct stat64* to), (file, to))
CALL(fstatat, noexcept, has(parent, path), (int parent, const char* path, struct stat* to, int flags),
     (parent, path, to, flags))
CALL(fstatat64, noexcept, has(parent, path), (int parent, const char* path, struct stat64* to, int flags),
     (parent, path, to, flags))
CALL(statx, noexcept, has(parent, path) || has(parent),
     (int parent, const char* path, int flags, unsigned mask, struct statx* to),
     (parent, path, flags, mask, to))

CALL(fsync, , has(file), (int file), (file))
CALL(fdatasync, , has(file), (int file), (file))
CALL(ftruncate, noexcept, has(file), (int file, off_t size), (file, size))
CALL(ftruncate64, noexcept, has(file), (int file, off64_t size), (file, size))
CALL(flock, noexcept, has(file), (int file, int operation), (file, operation))
CALL(chmod, noexcept, has(path), (const char* path, mode_t mode), (path, mode))
CALL(mkdir, noexcept, has(path), (const char* path, mode_t mode), (path, mode))
CALL(rmdir, noexcept, has(path), (const char* path), (path))
CALL(unlink, noexcept, has(path), (const char* path), (path))
CALL(unlinkat, noexcept, has(parent, path), (int parent, const char* path, int flags), (parent, path, flags))
CALL(rename, noexcept, has(to), (const char* from, const char* to), (from, to))
CALL(renameat, noexcept, has(new_parent, to),
     (int old_parent, const char* from, int new_parent, const char* to), (old_parent, from, new_parent, to))
CALL(renameat2, noexcept, has(new_parent, to),
     (int old_parent, const char* from, int new_parent, const char* to, unsigned flags),
     (old_parent, from, new_parent, to, flags))
CALL(link, noexcept, has(to), (const char* from, const char* to), (from, to))
CALL(linkat, noexcept, has(new_parent, to),
     (int old_parent, const char* from, int new_parent, const char* to, int flags),
     (old_parent, from, new_parent, to, flags))

// The descriptor is gone, whatever a close answers.
int close(int file) {
  GENUINE(close);
  const bool inside = has(file);
  note(file, false);
  const int result = genuine(file);
  return fails("close", inside) ? -1 : result;
}

DIR* opendir(const char* path) {
  GENUINE(opendir);
  return fails("opendir", has(path)) ? nullptr : genuine(path);
}

// These two answer with the error itself.
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* argument) noexcept {
  GENUINE(pthread_create);
  return is_struck("pthread_create") ? failure.load() : genuine(thread, attributes, start, argument);
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) noexcept {
  GENUINE(posix_memalign);
  return is_struck("posix_memalign") ? failure.load() : genuine(memory, alignment, size);
}

}  // extern "C"
