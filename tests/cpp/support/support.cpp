#include "support.hpp"

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <utility>

namespace pyint8::testing {
namespace {

std::size_t entries(const char* folder) {
  const std::filesystem::directory_iterator all(folder);
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

}  // namespace

std::size_t pick(Random& random, std::size_t low, std::size_t high) {
  return std::uniform_int_distribution<std::size_t>(low, high)(random);
}

Bytes random_bytes(std::size_t nbytes, std::uint64_t seed) {
  Random random(seed);
  Bytes bytes(nbytes);
  for (std::size_t i = 0; i < nbytes; i += sizeof(Random::result_type)) {
    const Random::result_type eight = random();
    std::memcpy(bytes.data() + i, &eight, std::min(sizeof eight, nbytes - i));
  }
  return bytes;
}

TempFile::TempFile(std::span<const std::byte> content) {
  std::string path = (std::filesystem::temp_directory_path() / "pyint8-test-XXXXXX").string();
  const int descriptor = ::mkstemp(path.data());
  REQUIRE(descriptor >= 0);
  path_ = path;
  std::ofstream(path_, std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
  ::close(descriptor);
}

TempFile::~TempFile() {
  ::unlink(path_.c_str());
}

Error error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  FAIL("no error");
  return Error(ErrorCode::kInvalidArgument, "");
}

std::optional<ErrorCode> error_code(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.code();
  }
  return std::nullopt;
}

int exit_code_of_child(const std::function<int()>& action) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(action());
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::size_t open_files() {
  return entries("/proc/self/fd");
}

std::size_t running_threads() {
  for (std::size_t count = 0;;) {  // until it settles
    const std::size_t before = std::exchange(count, entries("/proc/self/task"));
    if (count == before) return count;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

bool threads_become(std::size_t count) {
  for (int i = 0; i < 1000 && running_threads() != count; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return running_threads() == count;
}

std::size_t mapped_bytes() {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<std::size_t>(::getpagesize());
}

}  // namespace pyint8::testing
