#include "options.hpp"

#include <string>

#include "error.hpp"
#include "storage/source.hpp"

namespace pyint8 {
namespace {

void require_between(const char* name, std::size_t value, std::size_t low, std::size_t high) {
  if (value >= low && value <= high) return;
  throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is " + std::to_string(value) +
                                               "; it must be from " + std::to_string(low) + " to " +
                                               std::to_string(high));
}

}  // namespace

void validate(const EngineOptions& options) {
  require_between("threads", options.threads, 1, 1024);
  require_between("slots_per_thread", options.slots_per_thread, 1, 64);
  require_between("slot_bytes", options.slot_bytes, 2 * kDirectAlignment, std::size_t{1} << 30);
  if (options.slot_bytes % kDirectAlignment != 0) {
    throw Error(ErrorCode::kInvalidArgument, "slot_bytes is " + std::to_string(options.slot_bytes) +
                                                 "; it must be a multiple of " +
                                                 std::to_string(kDirectAlignment));
  }
}

}  // namespace pyint8
