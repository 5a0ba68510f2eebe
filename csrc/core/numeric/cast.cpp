#include "numeric/cast.hpp"

#include <cmath>
#include <cstring>
#include <string>

#include "error.hpp"
#include "numeric/half.hpp"

namespace pyint8 {
namespace {

float load(ElementType type, std::uintptr_t from, std::size_t index) {
  if (type == ElementType::kFloat) return reinterpret_cast<const float*>(from)[index];
  const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(from)[index];
  return type == ElementType::kHalf ? half_to_float(bits) : bfloat16_to_float(bits);
}

void store(ElementType type, std::uintptr_t to, std::size_t index, float value) {
  if (type == ElementType::kFloat) {
    reinterpret_cast<float*>(to)[index] = value;
  } else {
    reinterpret_cast<std::uint16_t*>(to)[index] =
        type == ElementType::kHalf ? float_to_half(value) : float_to_bfloat16(value);
  }
}

bool is_marked(Marks marks, float source, float result) {
  if (std::isfinite(result)) return false;
  return marks == Marks::kNotFinite || (std::isinf(result) && !std::isinf(source));
}

void require_known(ElementType type) {
  if (type == ElementType::kHalf || type == ElementType::kBFloat16 || type == ElementType::kFloat) return;
  throw Error(ErrorCode::kInvalidArgument, "unknown element type " + std::to_string(static_cast<int>(type)));
}

}  // namespace

void validate(const CastJob& job) {
  require_known(job.type);
  require_known(job.to_type);
  const bool to_half = job.to_type == ElementType::kHalf;
  if (job.through_bfloat16 && !to_half) {
    throw Error(ErrorCode::kInvalidArgument, "only a cast to fp16 goes through bfloat16");
  }
  if (job.type == job.to_type && !to_half) {
    throw Error(ErrorCode::kInvalidArgument, "values that have the dtype are not cast");
  }
  if (job.marks_at != 0 && (!to_half || job.elements_per_mark == 0)) {
    throw Error(ErrorCode::kInvalidArgument, "only a cast to fp16 has marks, each for an element at least");
  }
}

void cast(const CastJob& job) {
  validate(job);
  const bool rounds = job.through_bfloat16 && job.type != ElementType::kBFloat16;
  const bool keeps_bits = job.type == job.to_type && !rounds;
  for (std::size_t i = 0; i < job.elements; ++i) {
    const float source = load(job.type, job.from, i);
    const float value = rounds ? bfloat16_to_float(float_to_bfloat16(source)) : source;
    if (!keeps_bits) store(job.to_type, job.to, i, value);
    if (job.marks_at == 0) continue;
    if (is_marked(job.marks, source, half_to_float(float_to_half(value)))) {
      reinterpret_cast<std::uint8_t*>(job.marks_at)[i / job.elements_per_mark] = 1;
    }
  }
  if (keeps_bits && job.to != job.from) {  // those of a NaN too
    std::memcpy(reinterpret_cast<void*>(job.to), reinterpret_cast<const void*>(job.from),
                job.elements * size_of(job.type));
  }
}

}  // namespace pyint8
