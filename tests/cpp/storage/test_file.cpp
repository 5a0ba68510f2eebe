#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "pread.hpp"
#include "storage/file.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

struct Free {
  void operator()(std::byte* bytes) const { std::free(bytes); }
};
using Aligned = std::unique_ptr<std::byte[], Free>;

Aligned aligned_bytes(std::size_t nbytes) {
  return Aligned(static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, nbytes)));
}

constexpr std::size_t kOdd = 3 * kDirectAlignment + 123;

FileStamp stamp_of(const std::string& path) {
  struct stat status{};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return {status.st_dev, status.st_ino, status.st_size,
          status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
}

// Makes it a file that was last written at another time.
void touch(const std::string& path) {
  const timespec times[2] = {{0, UTIME_OMIT}, {12345, 678}};
  REQUIRE(::utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
}

void check_changed(const Error& error, const std::string& path) {
  CHECK(error.code() == ErrorCode::kChanged);
  CHECK(contains(error.message(), "changed while it was loaded; load it again"));
  CHECK(error.path() == path);
  CHECK_FALSE(error.offset().has_value());
}

}  // namespace

TEST_CASE("reads what lies at an offset, and no byte beyond its capacity") {
  const Bytes content = random_bytes(kOdd, 1);
  const TempFile temporary(content);
  const File file(temporary.path(), false);
  CHECK(file.path() == temporary.path());
  CHECK_FALSE(file.direct());
  Random random(2);
  for (int i = 0; i < 500; ++i) {
    const std::size_t offset = pick(random, 0, kOdd);
    const std::size_t needed = pick(random, 0, kOdd - offset);
    const std::size_t capacity = needed + pick(random, 0, 5000);  // may end behind the file
    Bytes out(capacity + 1, std::byte{0x5a});
    file.read_at(out.data(), needed, capacity, offset);
    REQUIRE(std::equal(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(needed),
                       content.begin() + static_cast<std::ptrdiff_t>(offset)));
    REQUIRE(out.back() == std::byte{0x5a});
  }
}

TEST_CASE("an open that a signal interrupts is retried, of the twin too") {
  const TempFile temporary(random_bytes(kOdd, 4));
  interrupted_opens = 2;
  const File file(temporary.path(), true);
  CHECK(interrupted_opens == 0);
}

TEST_CASE("what is no file is refused at once, as it is where a file was expected") {
  const TempFile temporary(random_bytes(kOdd, 5));
  const std::string pipe = temporary.path() + ".pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  for (const std::string& path : {pipe, std::string("/dev/zero"), std::string("/tmp")}) {
    for (const bool direct : {false, true}) {
      const Error error = error_of([&] { File(path, direct); });
      CHECK(error.code() == ErrorCode::kIo);
      CHECK(contains(error.message(), "this is no file, but a folder, a pipe or a device"));
      CHECK(error.path() == path);
    }
    const auto swapped_in = [&] { File(path, true, stamp_of(temporary.path())); };
    check_changed(error_of(swapped_in), path);
  }
  ::unlink(pipe.c_str());
}

TEST_CASE("short reads and interruptions are retried") {
  const Bytes content = random_bytes(kOdd, 3);
  const TempFile temporary(content);
  const File file(temporary.path(), false);
  Bytes out(content.size());
  fates = {{EINTR, 0}, {0, 1}, {EINTR, 0}, {EINTR, 0}, {0, 4096}, {0, 7}};
  file.read_at(out.data(), out.size(), out.size(), 0);
  CHECK(out == content);
  CHECK(fates.empty());
}

TEST_CASE("a failing read keeps the errno, and the offset that could not be read") {
  const TempFile temporary(random_bytes(kOdd, 4));
  const File file(temporary.path(), false);
  Bytes out(1000);
  fates = {{0, 10}, {EIO, 0}};
  const Error error = error_of([&] { file.read_at(out.data(), 1000, 1000, 100); });
  CHECK(error.code() == ErrorCode::kIo);
  CHECK(contains(error.message(), "cannot read the file"));
  CHECK(contains(error.message(), ": Input/output error"));
  CHECK(error.system_errno() == EIO);
  CHECK(error.path() == temporary.path());
  CHECK(error.offset() == 110);
}

TEST_CASE("a file that ends early is truncated, buffered or direct") {
  const TempFile temporary(random_bytes(kOdd, 5));
  for (const bool direct : {false, true}) {
    const File file(temporary.path(), direct);
    const Aligned out = aligned_bytes(4 * kDirectAlignment);
    for (const std::size_t offset : {0, 4096, 100, 12288}) {
      const std::size_t needed = kOdd - offset + 1;
      const Error error = error_of([&] { file.read_at(out.get(), needed, 4 * kDirectAlignment, offset); });
      CHECK(error.code() == ErrorCode::kTruncated);
      CHECK(contains(error.message(), "the file ends here, 1 bytes before"));
      CHECK(error.path() == temporary.path());
      CHECK(error.offset() == kOdd);
    }
    const Error behind = error_of([&] { file.read_at(out.get(), 1, 4096, 1 << 20); });
    CHECK(behind.code() == ErrorCode::kTruncated);
    CHECK(behind.offset() == kOdd);
  }
}

TEST_CASE("direct reads of a file of odd size are exact up to its last byte, and do go past the page cache") {
  const Bytes content = random_bytes(kOdd, 6);
  const TempFile temporary(content);
  const File file(temporary.path(), true);
  const Aligned out = aligned_bytes(4 * kDirectAlignment);
  const std::size_t before = direct_reads();
  for (std::size_t offset = 0; offset < kOdd; offset += kDirectAlignment) {
    const std::size_t needed = kOdd - offset;
    const std::size_t capacity = (needed + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
    file.read_at(out.get(), needed, capacity, offset);
    CHECK(std::equal(out.get(), out.get() + needed, content.begin() + static_cast<std::ptrdiff_t>(offset)));
  }
  if (file.direct()) CHECK(direct_reads() == before + 4);
  file.read_at(out.get() + 1, kOdd - 5, kOdd, 5);  // unaligned: the buffered way
  CHECK(std::equal(out.get() + 1, out.get() + 1 + kOdd - 5, content.begin() + 5));
  if (file.direct()) CHECK(direct_reads() == before + 4);
}

TEST_CASE("what is in the page cache is read from there, though direct reads were asked for") {
  const Bytes content = random_bytes(kOdd, 12);
  const TempFile temporary(content);
  const File file(temporary.path(), true);
  if (!file.direct()) return;
  const Aligned out = aligned_bytes(4 * kDirectAlignment);
  for (const auto& [pages, direct] : {std::pair<std::size_t, std::size_t>{0, 1}, {1, 1}, {3, 1}, {4, 0}}) {
    cached_pages = pages;  // of the four that the file has
    const std::size_t before = direct_reads();
    file.read_at(out.get(), kOdd, 4 * kDirectAlignment, 0);
    CHECK(direct_reads() == before + direct);
    CHECK(std::equal(content.begin(), content.end(), out.get()));
  }
  cached_pages = 0;
}

TEST_CASE("pages of 64 KiB: what lies within one is asked for as the page it lies in") {
  const TempFile temporary(random_bytes(3 * 65536, 8));
  const File file(temporary.path(), true);
  if (!file.direct()) return;
  const Aligned out = aligned_bytes(2 * 65536);
  page_bytes = 65536;
  for (const auto& [pages, direct] : {std::pair<std::size_t, std::size_t>{2, 0}, {1, 1}}) {
    cached_pages = pages;
    for (const auto& [offset, capacity] : {std::pair{0, 2 * 65536}, {4096, 65536}, {65536 - 4096, 8192}}) {
      const std::size_t before = direct_reads();
      file.read_at(out.get(), 8192, static_cast<std::size_t>(capacity), static_cast<std::uint64_t>(offset));
      CHECK(direct_reads() == before + direct);
    }
  }
  cached_pages = 0;
  page_bytes = 4096;
}

TEST_CASE("a read that is not aligned, in whatever way, does not give up the direct twin") {
  const Bytes content = random_bytes(4 * kDirectAlignment, 11);
  const TempFile temporary(content);
  const File file(temporary.path(), true);
  if (!file.direct()) return;
  const Aligned out = aligned_bytes(3 * kDirectAlignment);
  file.read_at(out.get() + 1, kDirectAlignment, kDirectAlignment, 0);
  file.read_at(out.get(), 4000, 4000, 0);
  file.read_at(out.get(), kDirectAlignment, kDirectAlignment, 512);
  CHECK(file.direct());
  const std::size_t before = direct_reads();
  file.read_at(out.get(), kDirectAlignment, kDirectAlignment, kDirectAlignment);
  CHECK(direct_reads() == before + 1);
}

TEST_CASE("where the file system refuses direct reads, the file is read all the same") {
  const Bytes content = random_bytes(2 * kDirectAlignment, 7);
  const TempFile temporary(content);
  const Aligned out = aligned_bytes(content.size());
  const File refused(temporary.path(), true);
  if (refused.direct()) {
    fates = {{EINVAL, 0}};
    refused.read_at(out.get(), content.size(), content.size(), 0);
    CHECK(std::equal(content.begin(), content.end(), out.get()));
    CHECK_FALSE(refused.direct());
  }
  const File unopened("/proc/version", true);  // refuses the twin itself
  CHECK_FALSE(unopened.direct());
  unopened.read_at(out.get(), 5, 4096, 0);
  CHECK(std::string(reinterpret_cast<char*>(out.get()), 5) == "Linux");
}

TEST_CASE("EINVAL without a direct twin is an error, not a loop") {
  const TempFile temporary(random_bytes(10, 8));
  const File file(temporary.path(), false);
  Bytes out(10);
  fates = {{EINVAL, 0}};
  CHECK(error_of([&] { file.read_at(out.data(), 10, 10, 0); }).system_errno() == EINVAL);
}

TEST_CASE("a path that cannot be opened, or not be read") {
  const Error absent = error_of([] { File("/nowhere/model.safetensors", true); });
  CHECK(absent.code() == ErrorCode::kIo);
  CHECK(absent.system_errno() == ENOENT);
  CHECK(absent.path() == "/nowhere/model.safetensors");
  CHECK_FALSE(absent.offset().has_value());
  CHECK(contains(absent.message(), "No such file"));

  CHECK(error_of([] { File("/tmp", false); }).system_errno() == EISDIR);
  if (::geteuid() == 0) return;  // root may read everything
  const TempFile forbidden(random_bytes(10, 9));
  ::chmod(forbidden.path().c_str(), 0);
  CHECK(error_of([&] { File(forbidden.path(), false); }).system_errno() == EACCES);
}

TEST_CASE("a file in another state than the expected one is not opened") {
  const TempFile temporary(random_bytes(kOdd, 13));
  const FileStamp right = stamp_of(temporary.path());
  const std::size_t before = open_files();
  for (const bool direct : {false, true}) {
    CHECK_NOTHROW(File(temporary.path(), direct, right));
    for (const auto& [device, inode, size, mtime_ns] :
         {std::array<int, 4>{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}}) {
      FileStamp wrong = right;
      wrong.device += device, wrong.inode += inode, wrong.size += size, wrong.mtime_ns += mtime_ns;
      check_changed(error_of([&] { File(temporary.path(), direct, wrong); }), temporary.path());
    }
  }
  CHECK(open_files() == before);
}

TEST_CASE("a file that is written to while it is open is not the one that was opened") {
  const TempFile temporary(random_bytes(kOdd, 14));
  const File file(temporary.path(), false);
  CHECK_NOTHROW(file.require_unchanged());
  touch(temporary.path());
  check_changed(error_of([&] { file.require_unchanged(); }), temporary.path());
}

TEST_CASE("a file that is replaced while it is open stays what it was, by whatever name") {
  const Bytes content = random_bytes(kOdd, 15);
  const TempFile temporary(content), other(random_bytes(kOdd, 16));
  const File file(temporary.path(), false, stamp_of(temporary.path()));
  REQUIRE(std::rename(other.path().c_str(), temporary.path().c_str()) == 0);
  Bytes out(kOdd);
  file.read_at(out.data(), kOdd, kOdd, 0);
  CHECK(out == content);
  CHECK_NOTHROW(file.require_unchanged());
}

TEST_CASE("a file that is cut while it is open has changed, rather than being too short") {
  const TempFile temporary(random_bytes(kOdd, 17));
  const File file(temporary.path(), false);
  REQUIRE(::truncate(temporary.path().c_str(), 100) == 0);
  Bytes out(kOdd);
  const Error error = error_of([&] { file.read_at(out.data(), kOdd, kOdd, 0); });
  CHECK(error.code() == ErrorCode::kChanged);
  CHECK(error.path() == temporary.path());
  CHECK(error.offset() == 100);
}

TEST_CASE("a file that is replaced before its direct twin is opened is refused") {
  const TempFile temporary(random_bytes(kOdd, 18)), other(random_bytes(kOdd, 19));
  if (!File(temporary.path(), true).direct()) return;
  before_direct_open = [&] { REQUIRE(std::rename(other.path().c_str(), temporary.path().c_str()) == 0); };
  const std::size_t before = open_files();
  const Error error = error_of([&] { File(temporary.path(), true); });
  before_direct_open = nullptr;
  check_changed(error, temporary.path());
  CHECK(open_files() == before);
}

TEST_CASE("descriptors are given back") {
  const TempFile temporary(random_bytes(10, 10));
  const std::size_t before = open_files();
  {
    const File file(temporary.path(), true);
    CHECK(open_files() > before);
  }
  CHECK_THROWS(File("/nowhere", true));
  CHECK(open_files() == before);
}

TEST_CASE("too many open files are told as that") {
  const TempFile temporary(random_bytes(10, 1));
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const rlimit none{0, before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  const Error error = error_of([&] { const File file(temporary.path(), false); });
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(error.system_errno() == EMFILE);
  CHECK(error.path() == temporary.path());
  CHECK(contains(error.message(), "ulimit -n"));
}

}  // namespace pyint8::testing
