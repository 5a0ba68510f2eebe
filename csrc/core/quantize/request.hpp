// What a consumer may be asked for, as plain data, and whether it can be done: pure.
#pragma once

#include <cstddef>
#include <optional>
#include <variant>
#include <vector>

#include "device/device.hpp"
#include "quantize/bands.hpp"
#include "transfer/engine.hpp"

namespace pyint8 {

// Bytes that were asked for before it was known what they are for: a head start's. The memory must stay until
// the request that names it has been waited for.
struct Landed {
  Ticket ticket;  // the engine's
  Address memory;
};

// Quantize to int8, in bitsandbytes' row-wise form.
struct ToInt8 {
  bool through_bfloat16;  // the model's dtype is bfloat16: round to it before fp16
  bool transposed;        // stored as [in, out], a Conv1D's weight: transpose it first
  Address codes;          // int8 [out, in]
  Address scales;         // fp32 [out]
};

// Cast to `dtype`, or leave as stored where there is none, whatever the bytes mean.
struct ToValues {
  std::optional<ElementType> dtype;
  Address values;
};

// One tensor, or a part of one. Destinations are contiguous memory of the consumer's device: where it is a
// part of a fused parameter, the address of that part's first row.
struct Request {
  std::variant<Range, Landed> from;  // contiguous rows
  ElementType stored;                // of no meaning where values stay as stored
  std::size_t rows, columns;         // as stored; columns are bytes where values stay as stored
  std::variant<ToInt8, ToValues> to;
  // uint8, or 0 for none; 1 is written where something is wrong, nothing elsewhere. For ToInt8 one for
  // each output row: it has NaN, infinity, or a value beyond fp16's range. For ToValues one for all: fp16 has
  // infinity where none was stored.
  Address marks;
};

// Whether values go to their place untouched.
bool stays_as_stored(const Request& request);
bool is_transposed(const Request& request);

// What requests pass through, in bytes.
struct Room {
  std::size_t band;        // of scratch: one row at least must fit
  std::size_t transposed;  // for the fp16 form of one transposed weight
  bool all_pass = false;   // through scratch: what stays as stored, too
};

// The bands of a request's rows; of what stays as stored one, or bands of bytes if all pass. Throws
// kInvalidArgument for a row that does not fit in a band, for a transposed weight that its memory cannot
// hold, for an empty one, for sizes that do not agree with the bytes, for more rows or columns than the
// quantizer's int counts, and for casts that there are not and marks that cannot be given.
std::vector<Band> bands_of(const Request& request, const Room& room);

}  // namespace pyint8
