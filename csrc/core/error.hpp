// The one exception of the core: a code to choose a class by, and the place it happened.
#pragma once

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <system_error>

namespace pyint8 {

enum class ErrorCode {
  kInvalidArgument,  // a caller's value that cannot be used
  kIo,               // the operating system refused; `system_errno` says why
  kTruncated,        // the file ends before the bytes that were asked for
  kChanged,          // the file is not, or no longer, in the state that was expected
  kDamaged,          // the bytes of a file are not those that were written
  kDriver,           // the GPU's driver is absent or refused a call
  kCancelled,        // the work was stopped
};

// The code's name as the Python side knows it.
const char* name_of(ErrorCode code);

class Error : public std::exception {
 public:
  Error(ErrorCode code, std::string message);

  // The same error, with its place in a file, or only the file.
  Error at(std::string path) const;
  Error at(std::string path, std::uint64_t offset) const;
  // An operating-system failure: `what` was tried, `system_errno` is why it failed.
  static Error io(const std::string& what, int system_errno, std::string path,
                  std::optional<std::uint64_t> offset);

  ErrorCode code() const { return code_; }
  const std::string& message() const { return message_; }
  const std::string& path() const { return path_; }
  std::optional<std::uint64_t> offset() const { return offset_; }
  int system_errno() const { return errno_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorCode code_;
  std::string message_;
  std::string path_;
  std::optional<std::uint64_t> offset_;
  int errno_ = 0;
};

// The error of a thread that the operating system did not start.
Error refused_thread(const std::system_error& error);

}  // namespace pyint8
