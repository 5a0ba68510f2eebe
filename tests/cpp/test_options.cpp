#include "options.hpp"
#include "support.hpp"

namespace pyint8::testing {
namespace {

void refused(const EngineOptions& options, const std::string& words) {
  const Error error = error_of([&] { validate(options); });
  CHECK(error.code() == ErrorCode::kInvalidArgument);
  CHECK(error.message() == words);
}

}  // namespace

TEST_CASE("the defaults and the limits themselves are accepted") {
  validate({});
  validate({.threads = 1, .spare_slots = 1, .slot_bytes = 8192});
  validate({.threads = 1024, .spare_slots = 1024, .slot_bytes = 1 << 30, .direct_io = true});
  CHECK(EngineOptions{.threads = 5, .spare_slots = 3}.slots() == 8);
}

TEST_CASE("a value out of its limits is refused by name, with the limits") {
  refused({.threads = 0}, "threads is 0; it must be from 1 to 1024");
  refused({.threads = 1025}, "threads is 1025; it must be from 1 to 1024");
  refused({.spare_slots = 0}, "spare_slots is 0; it must be from 1 to 1024");
  refused({.spare_slots = 1025}, "spare_slots is 1025; it must be from 1 to 1024");
  refused({.slot_bytes = 0}, "slot_bytes is 0; it must be from 8192 to 1073741824");
  refused({.slot_bytes = 4096}, "slot_bytes is 4096; it must be from 8192 to 1073741824");
  refused({.slot_bytes = (1 << 30) + 4096}, "slot_bytes is 1073745920; it must be from 8192 to 1073741824");
  refused({.slot_bytes = 10000}, "slot_bytes is 10000; it must be a multiple of 4096");
}

}  // namespace pyint8::testing
