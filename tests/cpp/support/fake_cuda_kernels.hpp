// The kernels of csrc/core/device/kernels.cu as plain loops over the same grid: blocks that were not launched
// leave their part of the destination as it was.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "device/kernel_tile.hpp"
#include "fake_cuda_order.hpp"
#include "numeric/half.hpp"

namespace fake_cuda {
using pyint8::kTile;

inline constexpr std::size_t kMostArguments = 6;
using KernelArguments = std::array<std::uint64_t, kMostArguments>;  // in the order of the kernels' parameters

enum class Element { kHalf, kBFloat16, kFloat };

struct Kernel {
  std::string_view name;
  std::size_t arguments;
  Element source;
  Element target;
  bool through_bfloat16;
};

constexpr Kernel transposing(std::string_view name, Element source, bool through_bfloat16 = false) {
  return {name, 5, source, Element::kHalf, through_bfloat16};
}

constexpr Kernel casting(std::string_view name, Element source, Element target,
                         bool through_bfloat16 = false) {
  return {name, 6, source, target, through_bfloat16};
}

inline constexpr std::array<Kernel, 14> kKernels = {{
    transposing("transpose_half", Element::kHalf),
    transposing("transpose_half_through_bfloat16", Element::kHalf, true),
    transposing("transpose_bfloat16", Element::kBFloat16),
    transposing("transpose_float", Element::kFloat),
    transposing("transpose_float_through_bfloat16", Element::kFloat, true),
    casting("cast_half_to_half", Element::kHalf, Element::kHalf),
    casting("cast_half_to_half_through_bfloat16", Element::kHalf, Element::kHalf, true),
    casting("cast_half_to_bfloat16", Element::kHalf, Element::kBFloat16),
    casting("cast_half_to_float", Element::kHalf, Element::kFloat),
    casting("cast_bfloat16_to_half", Element::kBFloat16, Element::kHalf),
    casting("cast_bfloat16_to_float", Element::kBFloat16, Element::kFloat),
    casting("cast_float_to_half", Element::kFloat, Element::kHalf),
    casting("cast_float_to_half_through_bfloat16", Element::kFloat, Element::kHalf, true),
    casting("cast_float_to_bfloat16", Element::kFloat, Element::kBFloat16),
}};

template <typename T>
T read(std::uint64_t address, std::uint64_t index) {
  T value;
  std::memcpy(&value, reinterpret_cast<const std::byte*>(address) + index * sizeof value, sizeof value);
  return value;
}

template <typename T>
void write(std::uint64_t address, std::uint64_t index, T value) {
  std::memcpy(reinterpret_cast<std::byte*>(address) + index * sizeof value, &value, sizeof value);
}

inline float load(Element element, std::uint64_t from, std::uint64_t index) {
  if (element == Element::kFloat) return read<float>(from, index);
  const auto bits = read<std::uint16_t>(from, index);
  return element == Element::kHalf ? pyint8::half_to_float(bits) : pyint8::bfloat16_to_float(bits);
}

// Returns the value that is there now.
inline float store(Element element, std::uint64_t to, std::uint64_t index, float value) {
  if (element == Element::kFloat) {
    write(to, index, value);
  } else if (element == Element::kHalf) {
    write(to, index, pyint8::float_to_half(value));
  } else {
    write(to, index, pyint8::float_to_bfloat16(value));
  }
  return load(element, to, index);
}

inline float rounded(const Kernel& kernel, float value) {
  return kernel.through_bfloat16 ? pyint8::bfloat16_to_float(pyint8::float_to_bfloat16(value)) : value;
}

inline void cast_element(const Kernel& kernel, const KernelArguments& arguments, std::uint64_t i) {
  const auto& [from, elements, to, marks, per_mark, overflow_only] = arguments;
  const float source = load(kernel.source, from, i);
  const bool is_same = kernel.source == kernel.target && !kernel.through_bfloat16;
  if (is_same) {
    write(to, i, read<std::uint16_t>(from, i));
  } else {
    store(kernel.target, to, i, rounded(kernel, source));
  }
  const float result = load(kernel.target, to, i);
  const bool is_new = std::isinf(result) && !std::isinf(source);
  if (marks == 0 || std::isfinite(result) || (overflow_only != 0 && !is_new)) return;
  write(marks, i / per_mark, std::uint8_t{1});
}

inline void run_cast(const Kernel& kernel, const KernelArguments& arguments, unsigned grid_x) {
  const std::uint64_t launched = std::uint64_t{grid_x} * pyint8::kCastElements;
  for (std::uint64_t i = 0; i < launched && i < arguments[1]; ++i) cast_element(kernel, arguments, i);
}

inline void run_transpose(const Kernel& kernel, const KernelArguments& arguments, unsigned grid_x,
                          unsigned grid_y) {
  const auto& [from, rows, columns, to, to_stride, unused] = arguments;
  for (std::uint64_t c = 0; c < std::uint64_t{grid_x} * kTile && c < columns; ++c) {
    for (std::uint64_t block_y = 0; block_y < grid_y; ++block_y) {
      for (std::uint64_t r0 = block_y * kTile; r0 < rows; r0 += std::uint64_t{grid_y} * kTile) {
        for (std::uint64_t r = r0; r < r0 + kTile && r < rows; ++r) {
          const float value = load(kernel.source, from, r * columns + c);
          store(Element::kHalf, to, c * to_stride + r, rounded(kernel, value));
        }
      }
    }
  }
}

inline void run(const Kernel& kernel, const KernelArguments& arguments, unsigned grid_x, unsigned grid_y) {
  if (kernel.name.starts_with("cast")) {
    run_cast(kernel, arguments, grid_x);
  } else {
    run_transpose(kernel, arguments, grid_x, grid_y);
  }
}

inline std::uint64_t size_of(Element element) {
  return element == Element::kFloat ? 4 : 2;
}

inline std::vector<Access> accesses_of(const Kernel& kernel, const KernelArguments& arguments) {
  if (kernel.name.starts_with("cast")) {
    const auto& [from, elements, to, marks, per_mark, unused] = arguments;
    const std::uint64_t marked = marks == 0 ? 0 : (elements - 1) / per_mark + 1;
    return {{from, elements * size_of(kernel.source), false},
            {to, elements * size_of(kernel.target), true},
            {marks, marked, true}};
  }
  const auto& [from, rows, columns, to, to_stride, unused] = arguments;
  return {{from, rows * columns * size_of(kernel.source), false},
          {to, ((columns - 1) * to_stride + rows) * size_of(Element::kHalf), true}};
}

// Row-wise absmax quantization: fp16 [rows, columns] to int8 codes and fp32 scales.
inline void quantize_rows(const void* half, void* codes, void* scales, int rows, int columns) {
  const auto from = reinterpret_cast<std::uint64_t>(half);
  for (std::int64_t row = 0; row < rows; ++row) {
    float largest = 0;
    for (std::int64_t i = row * columns; i < (row + 1) * columns; ++i) {
      const float size = std::fabs(load(Element::kHalf, from, i));
      if (size > largest) largest = size;  // never for NaN
    }
    static_cast<float*>(scales)[row] = largest;
    for (std::int64_t i = row * columns; i < (row + 1) * columns; ++i) {
      const float code = std::nearbyint(load(Element::kHalf, from, i) * (127.0f / largest));
      static_cast<std::int8_t*>(codes)[i] =
          std::isfinite(code) ? static_cast<std::int8_t>(code) : std::int8_t{0};
    }
  }
}

}  // namespace fake_cuda
