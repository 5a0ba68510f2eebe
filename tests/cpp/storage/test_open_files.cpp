// However many files there are, few are open; what is read is what was there when they were added.
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <deque>
#include <filesystem>
#include <thread>

#include "pread.hpp"
#include "storage/open_files.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

constexpr std::size_t kMost = 4;

// Files with a byte each, which is their number.
class Numbered {
 public:
  explicit Numbered(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      const std::byte content{static_cast<unsigned char>(i)};
      files_.emplace_back(std::span(&content, 1));
    }
  }
  const std::string& path(std::size_t number) const { return files_[number].path(); }
  std::vector<std::unique_ptr<Source>> open(OpenFiles& files, bool direct = false) const {
    std::vector<std::unique_ptr<Source>> sources;
    for (const TempFile& file : files_) sources.push_back(files.open(file.path(), direct, std::nullopt));
    return sources;
  }

 private:
  std::deque<TempFile> files_;
};

std::size_t read(const Source& source) {
  std::byte byte{255};
  source.read_at(&byte, 1, 1, 0);
  return static_cast<std::size_t>(byte);
}

}  // namespace

TEST_CASE("only so many are open, and all are read") {
  const Numbered numbered(20);
  const std::size_t before = open_files();
  {
    OpenFiles files(kMost);
    const auto sources = numbered.open(files);
    for (const std::size_t step : {1, 3, 7, 19}) {
      for (std::size_t i = 0; i < 60; ++i) {
        const std::size_t number = i * step % sources.size();
        CHECK(read(*sources[number]) == number);
        CHECK(open_files() <= before + kMost);
      }
    }
    for (const auto& source : sources) source->require_unchanged();
  }
  CHECK(open_files() == before);
}

TEST_CASE("the one that was read last stays open") {
  const Numbered numbered(10);
  OpenFiles files(kMost);
  const auto sources = numbered.open(files);
  read(*sources[0]);
  for (std::size_t i = 0; i < 10; ++i) {
    read(*sources[1 + i % (kMost - 1)]);
    read(*sources[0]);
  }
  std::filesystem::remove(numbered.path(0));
  CHECK(read(*sources[0]) == 0);  // it needs no path
}

TEST_CASE("a file that is read stays open, whatever others need") {
  const Numbered numbered(10);
  OpenFiles files(1);
  const auto sources = numbered.open(files);
  read_milliseconds = 100;
  std::atomic<std::size_t> found = 99;
  const std::size_t reads = all_reads();
  std::jthread slow([&] { found = read(*sources[0]); });
  while (all_reads() == reads) std::this_thread::yield();
  read_milliseconds = 0;
  std::filesystem::remove(numbered.path(0));
  for (std::size_t i = 1; i < 10; ++i) CHECK(read(*sources[i]) == i);
  slow.join();
  CHECK(found == 0);
}

TEST_CASE("a file that was replaced while it was closed has changed") {
  const Numbered numbered(10);
  OpenFiles files(kMost);
  const auto sources = numbered.open(files);
  std::filesystem::rename(numbered.path(5), numbered.path(0));
  CHECK(error_of([&] { read(*sources[0]); }).code() == ErrorCode::kChanged);
  CHECK(error_of([&] { sources[0]->require_unchanged(); }).code() == ErrorCode::kChanged);
  const Error error = error_of([&] { read(*sources[5]); });
  CHECK(error.code() == ErrorCode::kIo);
  CHECK(error.system_errno() == ENOENT);
  CHECK(error.path() == numbered.path(5));
}

TEST_CASE("where the process may open no more, those that nobody reads are closed") {
  const Numbered numbered(20);
  OpenFiles files(1000);
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const rlimit few{open_files() + 3, before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
  std::vector<std::size_t> found;
  try {
    const auto sources = numbered.open(files, true);
    for (const auto& source : sources) found.push_back(read(*source));
  } catch (const Error& error) {
    FAIL_CHECK(error.message());
  }
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(found.size() == 20);
  for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i] == i);
}

TEST_CASE("half of the descriptors that are left are left to others") {
  const Numbered numbered(20);
  rlimit usual{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &usual) == 0);
  const auto allow = [&](std::size_t left) {
    const rlimit limit{open_files() + left, usual.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
  };
  CHECK(descriptors_to_take(kMost) == kMost);
  allow(12);
  CHECK(descriptors_to_take(64) >= 2);
  CHECK(descriptors_to_take(64) <= 3);
  {
    const std::size_t before = open_files();
    OpenFiles files(descriptors_to_take(64));
    const auto sources = numbered.open(files, true);
    CHECK(read(*sources[0]) == 0);
    CHECK(open_files() <= before + 6);
  }
  allow(1);
  CHECK(descriptors_to_take(64) == 1);
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &usual) == 0);
}

TEST_CASE("threads that read at once") {
  const Numbered numbered(20);
  OpenFiles files(kMost);
  const auto sources = numbered.open(files);
  std::atomic<int> wrong = 0;
  {
    std::vector<std::jthread> threads;
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      threads.emplace_back([&, seed] {
        Random random(seed);
        for (int i = 0; i < 300; ++i) {
          const std::size_t number = pick(random, 0, 19);
          if (read(*sources[number]) != number) ++wrong;
        }
      });
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("what cannot be opened is said when it is added") {
  OpenFiles files(kMost);
  CHECK(error_of([&] { files.open("/nowhere", false, std::nullopt); }).system_errno() == ENOENT);
  const TempFile file(random_bytes(10, 1));
  const FileStamp other{1, 2, 3, 4};
  CHECK(error_of([&] { files.open(file.path(), false, other); }).code() == ErrorCode::kChanged);
}

}  // namespace pyint8::testing
