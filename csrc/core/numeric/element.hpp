// The dtypes of values that kernels compute with: F16, BF16 and F32 by the safetensors format's names.
#pragma once

#include <cstddef>

namespace pyint8 {

enum class ElementType : int { kHalf = 0, kBFloat16 = 1, kFloat = 2 };

constexpr std::size_t size_of(ElementType type) {
  return type == ElementType::kFloat ? 4 : 2;
}

}  // namespace pyint8
