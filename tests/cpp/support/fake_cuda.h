// What a test may ask of the fake driver, libfakecuda.so, beyond the driver's own entry points. The
// environment variable FAKE_CUDA_DEVICES is the number of its devices (4 by default; number 3 and the others
// cannot write to each other's memory), FAKE_CUDA_DELAY_US the longest delay before a stream's next operation
// (200 by default).
#pragma once

#include <cstdint>

extern "C" {

struct FakeCudaCounters {
  std::int64_t contexts;  // primary contexts' retains, not released yet
  std::int64_t streams;   // not destroyed yet; so are the next three
  std::int64_t events;
  std::int64_t modules;
  std::int64_t registered_bytes;
  std::int64_t device_bytes;     // that were allocated here, not freed yet
  std::int64_t peer_accesses;    // of a context to another's memory, not disabled yet
  std::int64_t pageable_copies;  // copies from memory that is not registered, which the bus makes slow
  // What would be memory corruption on a GPU: a race between streams too, as soon as it is asked for.
  std::int64_t violations;
};

void fake_cuda_counters(FakeCudaCounters* counters);

// The `nth_call`-th call of an entry point from now (1: the next; 0: none) answers `result`. Calls that give
// something back or wait do that nevertheless: they report, as the driver does, an error of earlier work.
void fake_cuda_fail_after(const char* entry_point, int nth_call, int result);

// From now on no device has access to this memory but its own, as if torch had mapped it itself; null: none
// is hidden any more.
void fake_cuda_hide(const void* begin, std::uint64_t nbytes);

// Calls of an entry point since the last reset.
std::int64_t fake_cuda_calls(const char* entry_point);

// Forgets failures, calls, pageable copies, violations and what is still registered; waits for destroyed
// streams to run empty.
void fake_cuda_reset();

// The driver's own name: calls `work(data)` on the stream's thread, after all that was put there before.
int cuLaunchHostFunc(struct CUstream_st* stream, void (*work)(void*), void* data);

// bitsandbytes' entry point, which is not the driver's: puts its kernel on the stream. It takes NaN for 0,
// and infinity for a row's largest value, as theirs does.
void cint8_vector_quant(const void* half, void* codes, void* scales, float threshold, int rows, int columns,
                        std::uintptr_t stream);

}  // extern "C"
