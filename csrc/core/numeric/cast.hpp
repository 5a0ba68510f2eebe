// Casting contiguous values, and marking those of them that the narrower dtype cannot hold.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numeric/element.hpp"

namespace pyint8 {

// What a mark is set for, where the target is fp16.
enum class Marks : int {
  kNotFinite = 0,  // NaN or infinity
  kOverflow = 1,   // infinity, where the source had none
};

// to[i] = to_type(model_dtype(from[i])), rounding to nearest even at both steps, as torch's casts round. From
// fp16 to fp16 it may be in place.
struct CastJob {
  std::uintptr_t from;  // `elements` of `type`, contiguous
  ElementType type;
  bool through_bfloat16;  // the model's dtype is bfloat16, and to_type is fp16: round to it first
  std::size_t elements;
  std::uintptr_t to;
  ElementType to_type;
  // uint8, one for every `elements_per_mark` elements in turn, or 0 for none. 1 is written where an element
  // is as `marks` says; nothing is written elsewhere. Only where to_type is fp16.
  std::uintptr_t marks_at = 0;
  std::size_t elements_per_mark = 1;
  Marks marks = Marks::kNotFinite;
};

// Throws kInvalidArgument where there is no such cast, or marks are wanted that cannot be given.
void validate(const CastJob& job);

// The CPU's road.
void cast(const CastJob& job);

}  // namespace pyint8
