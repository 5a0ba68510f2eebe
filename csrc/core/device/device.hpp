// Where bytes go: the interface that the engine drives, with one implementation for host memory and one for
// CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "numeric/cast.hpp"
#include "numeric/transpose.hpp"

namespace pyint8 {

// A stream of the caller (torch's current stream), as an integer; of no meaning to the host device.
using StreamHandle = std::uintptr_t;
// An address in the device's memory.
using Address = std::uintptr_t;

// A moment in one of a device's streams. Recording it again moves it.
class Event {
 public:
  virtual ~Event() = default;
  // Whether the moment has passed, or none was ever recorded.
  virtual bool passed() = 0;
  // From another moment to this one, both passed, of events that are timed.
  virtual double seconds_since(const Event&) { return 0; }
};

// Host memory that a device can read on its own, given back when destroyed.
class HostMemory {
 public:
  virtual ~HostMemory() = default;
  virtual std::byte* data() = 0;
};

// A stream of our own, destroyed with this.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual StreamHandle handle() const = 0;
  // Blocks until all that was put on it is over.
  virtual void synchronize() = 0;
};

// bitsandbytes' `cint8_vector_quant`, which at threshold 0 is all that its operator does: (fp16
// [rows, columns], int8 [rows, columns], fp32 [rows], threshold, rows, columns, stream).
using Quantizer = void (*)(const void* half, void* codes, void* scales, float threshold, int rows,
                           int columns, StreamHandle stream);

// Rows to quantize: fp16 [rows, columns] to codes, int8 [rows, columns], and scales, fp32 [rows].
struct QuantizeJob {
  Address half;
  Address codes;
  Address scales;
  int rows;
  int columns;
};

inline void call(Quantizer quantizer, const QuantizeJob& job, StreamHandle stream) {
  constexpr float kThreshold = 0;  // no outliers are set apart: those of weights are not
  quantizer(reinterpret_cast<const void*>(job.half), reinterpret_cast<void*>(job.codes),
            reinterpret_cast<void*>(job.scales), kThreshold, job.rows, job.columns, stream);
}

// A way of bytes from the host to a device's memory, with a copy stream of its own.
class Road {
 public:
  virtual ~Road() = default;

  virtual std::unique_ptr<Event> make_event() = 0;
  // One that also knows when it passed; null where there is none.
  virtual std::unique_ptr<Event> make_timed_event() { return nullptr; }
  // Copies on the copy stream; `from` must stay until an event recorded after has passed.
  virtual void copy(Address to, const std::byte* from, std::size_t nbytes) = 0;
  // Marks everything that was put on the copy stream so far.
  virtual void record(Event& event) = 0;
  // Copies issued from now on start after `event`.
  virtual void copies_wait_for(const Event& event) = 0;
  // Blocks until every copy issued so far has landed.
  virtual void synchronize() = 0;
};

// One that leads over another device's bus, through a little memory there, and from there on.
class Detour : public Road {
 public:
  // Takes that memory, for what lies in these pinned bytes of the host when it is copied.
  virtual void stage(const std::byte* slots, std::size_t nbytes) = 0;
  // Whether it leads to this place of the memory.
  virtual bool reaches(Address to) const = 0;
};

class Device : public Road {
 public:
  // Whether a worker reads straight into destinations, without a slot in between.
  virtual bool reads_in_place() const = 0;

  virtual std::unique_ptr<HostMemory> allocate_host(std::size_t nbytes) = 0;
  // Marks everything the caller put on `stream` so far.
  virtual void record_on(StreamHandle stream, Event& event) = 0;
  // What the caller puts on `stream` from now on starts after `event`.
  virtual void stream_waits_for(StreamHandle stream, const Event& event) = 0;

  virtual std::unique_ptr<Stream> make_stream() = 0;

  // Makes sure that the two below have what they need, which the first of them would do otherwise. Throws
  // kDriver where this build, or the driver, has no kernels for the device.
  virtual void prepare_kernels() = 0;
  // Transposes and casts a weight (see transpose.hpp) on `stream`.
  virtual void transpose_to_half(const TransposeJob& job, StreamHandle stream) = 0;
  // Copies from one place of the device's memory to another, on `stream`.
  virtual void copy_on_device(Address to, Address from, std::size_t nbytes, StreamHandle stream) = 0;
  // Casts values (see cast.hpp) on `stream`.
  virtual void cast(const CastJob& job, StreamHandle stream) = 0;
  // Lets `quantizer` put its work on `stream`.
  virtual void quantize(Quantizer quantizer, const QuantizeJob& job, StreamHandle stream) = 0;
};

// Bytes of pinned memory held by this process's devices right now.
std::size_t pinned_bytes_in_use();

}  // namespace pyint8
