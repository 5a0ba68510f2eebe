// The compiled kernels, embedded by the build (csrc/compile_kernels.py).
#pragma once

namespace pyint8 {

// Whether the build had a compiler for them.
bool has_kernels();
// PTX text, null-terminated; empty without kernels.
const char* kernels_ptx();

}  // namespace pyint8
