// Transposing a Conv1D weight [in, out] into a Linear weight [out, in], cast to fp16 on the way.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numeric/element.hpp"

namespace pyint8 {

// Source row r, column c goes to destination row c, column r:
//   to[c * to_stride + r] = half(model_dtype(from[r * columns + c]))
// Rounding is to nearest even at both steps, as torch's casts round.
struct TransposeJob {
  std::uintptr_t from;  // [rows, columns] elements of `type`, contiguous
  ElementType type;
  bool through_bfloat16;  // the model's dtype is bfloat16: round to it before fp16
  std::size_t rows;
  std::size_t columns;
  std::uintptr_t to;  // fp16; columns rows of `to_stride` elements, the first `rows` of each are written
  std::size_t to_stride;
};

// Throws kInvalidArgument if `to_stride` is smaller than `rows`, or a size overflows.
void validate(const TransposeJob& job);

// The CPU's road, with up to `threads` threads (fewer for a small weight).
void transpose_to_half(const TransposeJob& job, std::size_t threads);

}  // namespace pyint8
