"""Compile kernels.cu to PTX with NVRTC and write it as a C++ source file: `compile_kernels.py kernels.cu out.cpp`.

NVRTC 12.0 (a build requirement of 23 MB; no toolkit, headers or GPU needed) writes PTX ISA 8.0, which every driver
since 525 accepts; nvcc 13 would write ISA 9.0 and need 580. The oldest architecture it is asked for is Volta's.
Exits with 3, and writes a file without kernels, where NVRTC is not installed.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from pathlib import Path

_NO_COMPILER = 3
_PACKAGE = "nvidia-cuda-nvrtc-cu12"
_OPTIONS = [b"--gpu-architecture=compute_70", b"--std=c++17"]
_TEMPLATE = """// Written by csrc/compile_kernels.py.
#include "kernels_ptx.hpp"

namespace pyint8 {{

bool has_kernels() {{ return {present}; }}
const char* kernels_ptx() {{
  return R"PTX({ptx})PTX";
}}

}}  // namespace pyint8
"""


def find_nvrtc() -> Path | None:
    """The library inside the installed package; None where the package is not installed."""
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name.startswith("libnvrtc.so")), None)


def compile_to_ptx(library: Path, source: bytes) -> str:
    """The PTX of `source`. Raises RuntimeError with the compiler's log."""
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) != 0:
        raise RuntimeError("nvrtcCreateProgram failed")
    options = (ctypes.c_char_p * len(_OPTIONS))(*_OPTIONS)
    failed = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), options)
    kind = "ProgramLog" if failed else "PTX"
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"kernels.cu does not compile:\n{text.value.decode()}")
    return text.value.decode()


def main(source: Path, output: Path) -> int:
    library = find_nvrtc()
    ptx = "" if library is None else compile_to_ptx(library, source.read_bytes())
    output.write_text(_TEMPLATE.format(present="true" if ptx else "false", ptx=ptx))
    return 0 if ptx else _NO_COMPILER


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
