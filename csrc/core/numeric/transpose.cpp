#include "numeric/transpose.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "error.hpp"
#include "numeric/half.hpp"
#include "numeric/simd.hpp"

namespace pyint8 {
namespace {

// A tile of fp16 is 8 KiB: it, its source and its destination lines stay in a 32 KiB first-level cache.
constexpr std::size_t kTile = 64;
constexpr std::size_t kCacheLine = 64;
// Below this a thread costs more than it saves.
constexpr std::size_t kElementsPerThread = std::size_t{1} << 18;

using Tile = std::array<std::uint16_t, kTile * kTile>;

template <ElementType type>
float load(const std::byte* from, std::size_t index) {
  if constexpr (type == ElementType::kFloat) {
    return reinterpret_cast<const float*>(from)[index];
  } else if constexpr (type == ElementType::kBFloat16) {
    return bfloat16_to_float(reinterpret_cast<const std::uint16_t*>(from)[index]);
  } else {
    return half_to_float(reinterpret_cast<const std::uint16_t*>(from)[index]);
  }
}

// One row of a tile, converted to fp16.
using ConvertRow = void (*)(const std::byte* from, std::size_t count, std::uint16_t* to);

template <ElementType type, bool through_bfloat16>
void convert_row(const std::byte* from, std::size_t count, std::uint16_t* to) {
  for (std::size_t i = 0; i < count; ++i) {
    if constexpr (type == ElementType::kHalf && !through_bfloat16) {
      to[i] = reinterpret_cast<const std::uint16_t*>(from)[i];
    } else {
      const float value = load<type>(from, i);
      to[i] = float_to_half(through_bfloat16 ? bfloat16_to_float(float_to_bfloat16(value)) : value);
    }
  }
}

#if defined(__x86_64__)
// Eight at a time with the conversion instruction of every x86-64 since 2013.
template <ElementType type>
__attribute__((target("avx2,f16c"))) void convert_row_f16c(const std::byte* from, std::size_t count,
                                                           std::uint16_t* to) {
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 value;
    if constexpr (type == ElementType::kFloat) {
      value = _mm256_loadu_ps(reinterpret_cast<const float*>(from) + i);
    } else {
      const auto* source = reinterpret_cast<const std::uint16_t*>(from) + i;
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
      value = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  convert_row<type, false>(from + i * size_of(type), count - i, to + i);
}
#elif defined(__aarch64__)
// Four at a time with an instruction that every aarch64 has.
template <ElementType type>
void convert_row_neon(const std::byte* from, std::size_t count, std::uint16_t* to) {
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    float32x4_t value;
    if constexpr (type == ElementType::kFloat) {
      value = vld1q_f32(reinterpret_cast<const float*>(from) + i);
    } else {
      const uint16x4_t bits = vld1_u16(reinterpret_cast<const std::uint16_t*>(from) + i);
      value = vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
    }
    vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(value)));
  }
  convert_row<type, false>(from + i * size_of(type), count - i, to + i);
}
#endif

ConvertRow choose(ElementType type, bool through_bfloat16) {
#if defined(__x86_64__)
  if (!through_bfloat16 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    if (type == ElementType::kFloat) return convert_row_f16c<ElementType::kFloat>;
    if (type == ElementType::kBFloat16) return convert_row_f16c<ElementType::kBFloat16>;
  }
#elif defined(__aarch64__)
  if (!through_bfloat16 && type == ElementType::kFloat) return convert_row_neon<ElementType::kFloat>;
  if (!through_bfloat16 && type == ElementType::kBFloat16) return convert_row_neon<ElementType::kBFloat16>;
#endif
  switch (type) {
    case ElementType::kHalf:
      return through_bfloat16 ? convert_row<ElementType::kHalf, true>
                              : convert_row<ElementType::kHalf, false>;
    case ElementType::kBFloat16:
      return convert_row<ElementType::kBFloat16, false>;
    case ElementType::kFloat:
      return through_bfloat16 ? convert_row<ElementType::kFloat, true>
                              : convert_row<ElementType::kFloat, false>;
  }
  throw Error(ErrorCode::kInvalidArgument, "unknown element type " + std::to_string(static_cast<int>(type)));
}

#ifdef PYINT8_SIMD
// An 8 x 8 block in registers.
void transpose_8x8(const std::uint16_t* from, std::size_t from_stride, std::uint16_t* to,
                   std::size_t to_stride) {
  simd::Eight row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = simd::load(from + i * from_stride);
  for (int i = 0; i < 4; ++i) {
    pair[i] = simd::low16(row[2 * i], row[2 * i + 1]);
    pair[i + 4] = simd::high16(row[2 * i], row[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const simd::Eight* p = pair + 4 * half;
    simd::Eight* q = quad + 4 * half;
    q[0] = simd::low32(p[0], p[1]);
    q[1] = simd::high32(p[0], p[1]);
    q[2] = simd::low32(p[2], p[3]);
    q[3] = simd::high32(p[2], p[3]);
    for (int i = 0; i < 2; ++i) {
      const std::size_t column = 4 * half + 2 * i;
      simd::store(to + column * to_stride, simd::low64(q[i], q[i + 2]));
      simd::store(to + (column + 1) * to_stride, simd::high64(q[i], q[i + 2]));
    }
  }
}
#endif

// Writes the first `rows` x `columns` of a tile, transposed.
void write_transposed(const Tile& tile, std::size_t rows, std::size_t columns, std::uint16_t* to,
                      std::size_t to_stride) {
  std::size_t whole_rows = 0;
  std::size_t whole_columns = 0;
#ifdef PYINT8_SIMD
  whole_rows = rows / 8 * 8;
  whole_columns = columns / 8 * 8;
  for (std::size_t c = 0; c < whole_columns; c += 8) {
    for (std::size_t r = 0; r < whole_rows; r += 8) {
      transpose_8x8(&tile[r * kTile + c], kTile, to + c * to_stride + r, to_stride);
    }
  }
#endif
  for (std::size_t c = 0; c < columns; ++c) {
    for (std::size_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) {
      to[c * to_stride + r] = tile[r * kTile + c];
    }
  }
}

// A tile's rows lie far apart, where the hardware does not prefetch.
template <int for_writing>
void prefetch(const void* start, std::size_t nbytes) {
  const auto* bytes = static_cast<const char*>(start);
  for (std::size_t i = 0; i < nbytes; i += kCacheLine) __builtin_prefetch(bytes + i, for_writing);
}

// The source columns [first, last), which are destination rows, so threads write apart from each other.
void transpose_columns(const TransposeJob& job, ConvertRow convert, std::size_t first, std::size_t last) {
  const auto* from = reinterpret_cast<const std::byte*>(job.from);
  auto* to = reinterpret_cast<std::uint16_t*>(job.to);
  const std::size_t size = size_of(job.type);
  Tile tile;
  for (std::size_t c = first; c < last; c += kTile) {
    const std::size_t columns = std::min(kTile, last - c);
    for (std::size_t r = 0; r < job.rows; r += kTile) {
      const std::size_t rows = std::min(kTile, job.rows - r);
      for (std::size_t i = 0; i < columns; ++i) {
        prefetch<1>(to + (c + i) * job.to_stride + r, rows * sizeof(std::uint16_t));
      }
      for (std::size_t i = 0; i < rows; ++i) {
        const std::size_t ahead = r + kTile + i;
        if (ahead < job.rows) prefetch<0>(from + (ahead * job.columns + c) * size, columns * size);
        convert(from + ((r + i) * job.columns + c) * size, columns, &tile[i * kTile]);
      }
      write_transposed(tile, rows, columns, to + c * job.to_stride + r, job.to_stride);
    }
  }
}

// False if the operating system refuses a thread.
template <typename Work>
bool starts(std::vector<std::jthread>& threads, const Work& work) {
  try {
    threads.emplace_back(work);
  } catch (const std::system_error&) {
    return false;
  }
  return true;
}

}  // namespace

void validate(const TransposeJob& job) {
  constexpr std::size_t kMost = std::numeric_limits<std::ptrdiff_t>::max() / 4;  // of 4-byte elements
  if (job.to_stride < job.rows) {
    throw Error(ErrorCode::kInvalidArgument, "a destination stride of " + std::to_string(job.to_stride) +
                                                 " cannot hold " + std::to_string(job.rows) + " columns");
  }
  if (job.columns != 0 && job.to_stride > kMost / job.columns) {
    throw Error(ErrorCode::kInvalidArgument, "a weight of " + std::to_string(job.to_stride) + " x " +
                                                 std::to_string(job.columns) + " elements is too large");
  }
}

void transpose_to_half(const TransposeJob& job, std::size_t threads) {
  validate(job);
  const ConvertRow convert = choose(job.type, job.through_bfloat16);
  const std::size_t tiles = (job.columns + kTile - 1) / kTile;
  const std::size_t useful = std::max<std::size_t>(1, job.rows * job.columns / kElementsPerThread);
  const std::size_t count = std::max<std::size_t>(1, std::min({threads, useful, tiles}));

  std::vector<std::jthread> helpers;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t first = tiles * i / count * kTile;
    const std::size_t last = std::min(job.columns, tiles * (i + 1) / count * kTile);
    const auto work = [&job, convert, first, last] { transpose_columns(job, convert, first, last); };
    if (i + 1 == count || !starts(helpers, work)) work();
  }
}

}  // namespace pyint8
