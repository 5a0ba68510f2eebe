// Where bytes go: the interface that the engine drives, with one implementation for host memory and one for
// CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

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
};

// Host memory that a device can read on its own, given back when destroyed.
class HostMemory {
 public:
  virtual ~HostMemory() = default;
  virtual std::byte* data() = 0;
};

class Device {
 public:
  virtual ~Device() = default;

  // Whether a worker reads straight into destinations, without a slot in between.
  virtual bool reads_in_place() const = 0;

  virtual std::unique_ptr<HostMemory> allocate_host(std::size_t nbytes) = 0;
  virtual std::unique_ptr<Event> make_event() = 0;

  // Copies on the device's own copy stream; `from` must stay until an event recorded after has passed.
  virtual void copy(Address to, const std::byte* from, std::size_t nbytes) = 0;
  // Marks everything that was put on the copy stream so far.
  virtual void record(Event& event) = 0;
  // Copies issued from now on start after `event`.
  virtual void copies_wait_for(const Event& event) = 0;
  // Marks everything the caller put on `stream` so far.
  virtual void record_on(StreamHandle stream, Event& event) = 0;
  // What the caller puts on `stream` from now on starts after `event`.
  virtual void stream_waits_for(StreamHandle stream, const Event& event) = 0;
  // Blocks until every copy issued so far has landed.
  virtual void synchronize() = 0;

  // Transposes and casts a weight (see transpose.hpp) on `stream`.
  virtual void transpose_to_half(const TransposeJob& job, StreamHandle stream) = 0;
};

// Bytes of pinned memory held by this process's devices right now.
std::size_t pinned_bytes_in_use();

}  // namespace pyint8
