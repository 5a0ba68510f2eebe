// The compiled kernels, embedded by the build (csrc/compile_kernels.py).
#pragma once

#include <span>

namespace pyint8 {

struct KernelImage {
  int architecture;  // machine code for compute capability 8.0 is 80, and runs on 8.x; PTX, for all, is 0
  const void* data;
};

// Machine code, the newest architecture first, then PTX; empty if the build had no compiler for them.
std::span<const KernelImage> kernel_images();

}  // namespace pyint8
