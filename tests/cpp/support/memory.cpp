#include "memory.hpp"

#include <atomic>
#include <cstdlib>
#include <new>

#include "support.hpp"

// Of the linker: where this program's own code begins and ends.
extern "C" char __executable_start, etext;

namespace pyint8::testing {
namespace {

std::atomic<bool> is_counting = false;
std::atomic<std::size_t> made = 0;
std::atomic<std::size_t> first_refused = 0, last_refused = 0;  // by number, from 1 on
thread_local int unrefused = 0;

// Of allocations by the core and the tests; the driver and the C++ library have all that they want.
bool is_refused(const void* caller) {
  if (!is_counting || unrefused > 0 || caller < &__executable_start || caller >= &etext) return false;
  const std::size_t number = ++made;
  return number >= first_refused && number <= last_refused;
}

// How a load with these allocations refused went: whether it succeeded.
bool run(Load& load, std::size_t first, std::size_t last) {
  first_refused = first;
  last_refused = last;
  made = 0;
  bool succeeded = false;
  is_counting = true;
  try {
    load.run();
    succeeded = true;
  } catch (const std::bad_alloc&) {
  } catch (const Error&) {  // of what came of it
  }
  is_counting = false;
  load.synchronize();
  return succeeded;
}

void require_nothing_left(std::size_t threads, std::size_t files) {
  const FakeCudaCounters after = counters();
  fake_cuda_reset();  // joins the streams
  CHECK(after.registered_bytes == 0);
  CHECK(after.violations == 0);
  CHECK(pinned_bytes_in_use() == 0);
  CHECK(threads_become(threads));
  CHECK(open_files() == files);
}

bool refuse(Load& load, std::size_t first, std::size_t last) {
  fake_cuda_reset();
  const FakeCudaCounters before = counters();
  const std::size_t threads = running_threads(), files = open_files();
  const bool succeeded = run(load, first, last);
  CHECK((!succeeded || load.arrived()));
  const FakeCudaCounters after = counters();
  CHECK(after.contexts == before.contexts);
  CHECK(after.streams == before.streams);
  CHECK(after.events == before.events);
  CHECK(after.modules == before.modules);
  require_nothing_left(threads, files);
  return succeeded;
}

}  // namespace

Unrefused::Unrefused() {
  ++unrefused;
}

Unrefused::~Unrefused() {
  --unrefused;
}

std::size_t refuse_each_allocation(const std::function<std::unique_ptr<Load>()>& make) {
  constexpr std::size_t kNone = 0, kAll = static_cast<std::size_t>(-1);
  REQUIRE(refuse(*make(), kNone, kNone));
  const std::size_t count = made;
  std::size_t failures = 0;
  for (const std::size_t number : some_up_to(count)) {
    CAPTURE(number);
    for (const std::size_t last : {number, kAll}) failures += refuse(*make(), number, last) ? 0 : 1;
    REQUIRE(refuse(*make(), kNone, kNone));
  }
  return failures;
}

}  // namespace pyint8::testing

void* operator new(std::size_t nbytes) {
  if (pyint8::testing::is_refused(__builtin_return_address(0))) throw std::bad_alloc();
  void* memory = std::malloc(nbytes == 0 ? 1 : nbytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// The C++ library's would call the above, AddressSanitizer's does not.
void* operator new(std::size_t nbytes, const std::nothrow_t&) noexcept {
  try {
    return operator new(nbytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void operator delete(void* memory) noexcept {
  std::free(memory);
}

void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
