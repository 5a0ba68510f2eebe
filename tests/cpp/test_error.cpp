#include <cerrno>

#include "support.hpp"

namespace pyint8::testing {

TEST_CASE("an error keeps its code and message, and has no place until it is given one") {
  const Error error(ErrorCode::kDriver, "the words");
  CHECK(error.code() == ErrorCode::kDriver);
  CHECK(error.message() == "the words");
  CHECK(std::string(error.what()) == "the words");
  CHECK(error.path().empty());
  CHECK_FALSE(error.offset().has_value());
  CHECK(error.system_errno() == 0);
}

TEST_CASE("at() places a copy") {
  const Error error(ErrorCode::kTruncated, "the words");
  const Error placed = error.at("/a/file", 0);
  CHECK(placed.code() == ErrorCode::kTruncated);
  CHECK(placed.message() == "the words");
  CHECK(placed.path() == "/a/file");
  CHECK(placed.offset() == 0);
  CHECK_FALSE(error.offset().has_value());
  CHECK(error.at("/a/file").path() == "/a/file");
  CHECK_FALSE(error.at("/a/file").offset().has_value());
}

TEST_CASE("an operating-system failure says why") {
  const Error error = Error::io("cannot open the file", ENOENT, "/a/file", std::nullopt);
  CHECK(error.code() == ErrorCode::kIo);
  CHECK(error.message() == "cannot open the file: No such file or directory");
  CHECK(error.path() == "/a/file");
  CHECK_FALSE(error.offset().has_value());
  CHECK(error.system_errno() == ENOENT);
  CHECK(Error::io("", EIO, "", 7).offset() == 7);
}

TEST_CASE("every code has the name that pyint8/errors.py knows") {
  CHECK(std::string(name_of(ErrorCode::kInvalidArgument)) == "invalid_argument");
  CHECK(std::string(name_of(ErrorCode::kIo)) == "io");
  CHECK(std::string(name_of(ErrorCode::kTruncated)) == "truncated");
  CHECK(std::string(name_of(ErrorCode::kChanged)) == "changed");
  CHECK(std::string(name_of(ErrorCode::kDamaged)) == "damaged");
  CHECK(std::string(name_of(ErrorCode::kDriver)) == "driver");
  CHECK(std::string(name_of(ErrorCode::kCancelled)) == "cancelled");
}

}  // namespace pyint8::testing
