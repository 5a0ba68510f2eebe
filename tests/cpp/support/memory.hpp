// Stands before the allocator in the tests: to refuse memory to the core, and to what runs with it.
#pragma once

#include <functional>
#include <memory>

#include "driver_failures.hpp"

namespace pyint8::testing {

// While one lives, this thread's assertions, which allocate, get what they ask for.
class Unrefused {
 public:
  Unrefused();
  ~Unrefused();
  Unrefused(const Unrefused&) = delete;
  Unrefused& operator=(const Unrefused&) = delete;
};

// Runs loads in which one allocation is refused, each in turn, or all from that one on. Whatever happens must
// be std::bad_alloc, an Error or success, and nothing may be left. Returns how many did not succeed.
std::size_t refuse_each_allocation(const std::function<std::unique_ptr<Load>()>& make);

}  // namespace pyint8::testing
