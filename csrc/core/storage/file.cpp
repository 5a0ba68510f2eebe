#include "storage/file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include "error.hpp"

namespace pyint8 {
namespace {

const char* advice_for(int open_errno) {
  if (open_errno == EMFILE || open_errno == ENFILE) return "cannot open the file (raise `ulimit -n`)";
  return "cannot open the file (is it there, and readable by this user?)";
}

// Without O_NONBLOCK, opening a pipe that nobody writes to would never return.
int open_for_reading(const std::string& path, int flags = 0) {
  int descriptor = -1;
  do {
    descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

int open_direct([[maybe_unused]] const std::string& path) {
#ifdef O_DIRECT
  return open_for_reading(path, O_DIRECT);
#else
  return -1;
#endif
}

struct stat status_of(int descriptor, const std::string& path) {
  struct stat status{};
  if (::fstat(descriptor, &status) != 0)
    throw Error::io("cannot look at the file", errno, path, std::nullopt);
  return status;
}

FileStamp stamp_of(int descriptor, const std::string& path) {
  const struct stat status = status_of(descriptor, path);
  return {status.st_dev, status.st_ino, status.st_size,
          status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
}

void require_regular(int descriptor, const std::string& path) {
  const mode_t mode = status_of(descriptor, path).st_mode;
  if (S_ISREG(mode)) return;
  throw Error::io("this is no file, but a folder, a pipe or a device; put the file itself there",
                  S_ISDIR(mode) ? EISDIR : EINVAL, path, std::nullopt);
}

// Some file systems pass O_NONBLOCK on to whoever serves the reads.
void let_block(int descriptor) {
  if (const int flags = ::fcntl(descriptor, F_GETFL); flags >= 0)
    ::fcntl(descriptor, F_SETFL, flags & ~O_NONBLOCK);
}

Error changed() {
  return Error(ErrorCode::kChanged,
               "the file changed while it was loaded; load it again, once nothing writes to it");
}

}  // namespace

Descriptor::~Descriptor() {
  if (number_ >= 0) ::close(number_);
}

File::File(std::string path, bool direct, const std::optional<FileStamp>& expected)
    : path_(std::move(path)),
      buffered_(open_for_reading(path_)),
      twin_(buffered_.number() >= 0 && direct ? open_direct(path_) : -1),
      direct_(twin_.number()) {
  if (buffered_.number() < 0) throw Error::io(advice_for(errno), errno, path_, std::nullopt);
  stamp_ = stamp_of(buffered_.number(), path_);
  if (expected.has_value()) require(buffered_.number(), *expected);
  require_regular(buffered_.number(), path_);
  let_block(buffered_.number());
  if (twin_.number() < 0) return;
  require(twin_.number(), stamp_);  // it was opened by the same path, but later
  let_block(twin_.number());
  map_for_direct_reads();
}

File::~File() {
  if (map_ != nullptr) ::munmap(map_, mapped_);
}

void File::map_for_direct_reads() {
  if (stamp_.size <= 0) return;
  mapped_ = static_cast<std::uint64_t>(stamp_.size);
  map_ = ::mmap(nullptr, mapped_, PROT_READ, MAP_SHARED, buffered_.number(), 0);
  if (map_ == MAP_FAILED) map_ = nullptr;
}

void File::require(int descriptor, const FileStamp& expected) const {
  if (stamp_of(descriptor, path_) != expected) throw changed().at(path_);
}

void File::require_unchanged() const {
  require(buffered_.number(), stamp_);
}

// Whether all pages of a range are in the page cache. Where the kernel hides this (for files of other users)
// it answers yes, and reads go through the page cache, as they do without `direct`.
bool File::is_cached(std::uint64_t offset, std::size_t nbytes) const {
  if (map_ == nullptr || offset >= mapped_) return false;
  const auto page_bytes = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));  // 64 KiB on some aarch64
  const std::uint64_t first = offset - offset % page_bytes;
  const auto length = static_cast<std::size_t>(std::min(offset + nbytes, mapped_) - first);
  std::vector<unsigned char> pages((length + page_bytes - 1) / page_bytes);
  if (::mincore(static_cast<std::byte*>(map_) + first, length, pages.data()) != 0) return false;
  return std::ranges::all_of(pages, [](unsigned char page) { return (page & 1) != 0; });
}

int File::descriptor_for(const std::byte* out, std::size_t capacity, std::uint64_t offset) const {
  const int direct = direct_.load(std::memory_order_relaxed);
  const bool aligned = (reinterpret_cast<std::uintptr_t>(out) | capacity | offset) % kDirectAlignment == 0;
  return direct >= 0 && aligned && !is_cached(offset, capacity) ? direct : buffered_.number();
}

void File::throw_truncated(std::uint64_t wanted, std::size_t missing) const {
  const FileStamp now = stamp_of(buffered_.number(), path_);
  // A read may lie wholly behind the end.
  const std::uint64_t at = std::min(wanted, static_cast<std::uint64_t>(now.size));
  if (now != stamp_) throw changed().at(path_, at);
  throw Error(ErrorCode::kTruncated, "the file ends here, " + std::to_string(wanted - at + missing) +
                                         " bytes before the tensor does; fetch it again")
      .at(path_, at);
}

void File::read_at(std::byte* out, std::size_t needed, std::size_t capacity, std::uint64_t offset) const {
  std::size_t got = 0;
  while (got < needed) {
    const int descriptor = descriptor_for(out + got, capacity - got, offset + got);
    const ssize_t count = ::pread(descriptor, out + got, capacity - got, static_cast<off_t>(offset + got));
    if (count > 0) {
      got += static_cast<std::size_t>(count);
    } else if (count == 0) {
      throw_truncated(offset + got, needed - got);
    } else if (errno == EINVAL && descriptor != buffered_.number()) {
      direct_.store(-1, std::memory_order_relaxed);
    } else if (errno != EINTR) {
      throw Error::io("cannot read the file (check the disk or the network it lies on, and load again)",
                      errno, path_, offset + got);
    }
  }
}

}  // namespace pyint8
