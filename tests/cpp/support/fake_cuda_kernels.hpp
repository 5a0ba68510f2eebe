// The kernels of csrc/core/device/kernels.cu as plain loops over the same grid: blocks that were not launched
// leave their part of the destination as it was.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "device/kernel_tile.hpp"
#include "numeric/half.hpp"

namespace fake_cuda {
using pyint8::kTile;

struct KernelArguments {  // in the order of the kernels' parameters
  std::uint64_t from, rows, columns, to, to_stride;
};

struct Kernel {
  std::string_view name;
  std::size_t element_bytes;
  float (*load)(const std::byte* element);
  bool through_bfloat16;
};

template <typename Bits, float (*convert)(Bits)>
float load(const std::byte* element) {
  Bits bits;
  std::memcpy(&bits, element, sizeof bits);
  return convert(bits);
}

inline float identity(float value) {
  return value;
}

inline constexpr std::array<Kernel, 5> kKernels = {{
    {"transpose_half", 2, load<std::uint16_t, pyint8::half_to_float>, false},
    {"transpose_half_through_bfloat16", 2, load<std::uint16_t, pyint8::half_to_float>, true},
    {"transpose_bfloat16", 2, load<std::uint16_t, pyint8::bfloat16_to_float>, false},
    {"transpose_float", 4, load<float, identity>, false},
    {"transpose_float_through_bfloat16", 4, load<float, identity>, true},
}};

inline void transpose_element(const Kernel& kernel, const KernelArguments& a, std::uint64_t r,
                              std::uint64_t c) {
  const auto* from = reinterpret_cast<const std::byte*>(a.from);
  float value = kernel.load(from + (r * a.columns + c) * kernel.element_bytes);
  if (kernel.through_bfloat16) value = pyint8::bfloat16_to_float(pyint8::float_to_bfloat16(value));
  reinterpret_cast<std::uint16_t*>(a.to)[c * a.to_stride + r] = pyint8::float_to_half(value);
}

inline void run(const Kernel& kernel, const KernelArguments& a, unsigned grid_x, unsigned grid_y) {
  for (std::uint64_t c = 0; c < std::uint64_t{grid_x} * kTile && c < a.columns; ++c) {
    for (std::uint64_t block_y = 0; block_y < grid_y; ++block_y) {
      for (std::uint64_t r0 = block_y * kTile; r0 < a.rows; r0 += std::uint64_t{grid_y} * kTile) {
        for (std::uint64_t r = r0; r < r0 + kTile && r < a.rows; ++r) transpose_element(kernel, a, r, c);
      }
    }
  }
}

}  // namespace fake_cuda
