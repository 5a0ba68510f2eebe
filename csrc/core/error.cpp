#include "error.hpp"

#include <utility>

namespace pyint8 {

const char* name_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid_argument";
    case ErrorCode::kIo:
      return "io";
    case ErrorCode::kTruncated:
      return "truncated";
    case ErrorCode::kChanged:
      return "changed";
    case ErrorCode::kDamaged:
      return "damaged";
    case ErrorCode::kDriver:
      return "driver";
    case ErrorCode::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

Error::Error(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}

Error Error::at(std::string path) const {
  Error placed = *this;
  placed.path_ = std::move(path);
  return placed;
}

Error Error::at(std::string path, std::uint64_t offset) const {
  Error placed = at(std::move(path));
  placed.offset_ = offset;
  return placed;
}

Error Error::io(const std::string& what, int system_errno, std::string path,
                std::optional<std::uint64_t> offset) {
  Error error(ErrorCode::kIo, what + ": " + std::generic_category().message(system_errno));
  error.path_ = std::move(path);
  error.offset_ = offset;
  error.errno_ = system_errno;
  return error;
}

Error refused_thread(const std::system_error& error) {
  return Error::io("cannot start a thread (raise `ulimit -u`, or end other processes)", error.code().value(),
                   "", std::nullopt);
}

}  // namespace pyint8
