// What several of the tests need.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <functional>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "error.hpp"

namespace pyint8::testing {

using Bytes = std::vector<std::byte>;
using Random = std::mt19937_64;

// From `low` to `high`, both included.
std::size_t pick(Random& random, std::size_t low, std::size_t high);
Bytes random_bytes(std::size_t nbytes, std::uint64_t seed);

// A file with this content for as long as the object lives.
class TempFile {
 public:
  explicit TempFile(std::span<const std::byte> content);
  ~TempFile();
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// The Error that `action` throws; fails the test if it throws none.
Error error_of(const std::function<void()>& action);
// Its code, if it throws one; asserts nothing.
std::optional<ErrorCode> error_code(const std::function<void()>& action);
bool contains(const std::string& text, const std::string& part);

// The exit code of a forked child, whose main is `action`: no assertions, they would write to the parent's
// report.
int exit_code_of_child(const std::function<int()>& action);

// Of this process.
std::size_t open_files();
std::size_t running_threads();
// Whether there are soon `count` threads: one that was joined may be listed for a moment more.
bool threads_become(std::size_t count);
std::size_t mapped_bytes();

}  // namespace pyint8::testing
