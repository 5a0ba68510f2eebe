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
  validate({.threads = 1, .slots_per_thread = 1, .slot_bytes = 8192});
  validate({.threads = 1024, .slots_per_thread = 64, .slot_bytes = 1 << 30, .direct_io = true});
  CHECK(EngineOptions{.slots_per_thread = 3, .slot_bytes = 8192}.ring_bytes() == 24576);
}

TEST_CASE("a value out of its limits is refused by name, with the limits") {
  refused({.threads = 0}, "threads is 0; it must be from 1 to 1024");
  refused({.threads = 1025}, "threads is 1025; it must be from 1 to 1024");
  refused({.slots_per_thread = 0}, "slots_per_thread is 0; it must be from 1 to 64");
  refused({.slots_per_thread = 65}, "slots_per_thread is 65; it must be from 1 to 64");
  refused({.slot_bytes = 0}, "slot_bytes is 0; it must be from 8192 to 1073741824");
  refused({.slot_bytes = 4096}, "slot_bytes is 4096; it must be from 8192 to 1073741824");
  refused({.slot_bytes = (1 << 30) + 4096}, "slot_bytes is 1073745920; it must be from 8192 to 1073741824");
  refused({.slot_bytes = 10000}, "slot_bytes is 10000; it must be a multiple of 4096");
}

}  // namespace pyint8::testing
