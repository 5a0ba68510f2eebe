"""Compile device/kernels.cu with NVRTC and write it as a C++ source file: `compile_kernels.py kernels.cu out.cpp`.

NVRTC 12.0 (a build requirement of 23 MB; no toolkit, headers or GPU needed) writes PTX ISA 8.0 and machine code that
every driver since 525 accepts; nvcc 13 would write ISA 9.0 and need 580. The PTX, for Volta and all that came after,
has to be compiled by the driver where it is new to it; the machine code, for the architectures named here and those of
the same major version, not (docs/performance.md, "First kernels of a process").
Exits with 3, and writes a file without kernels, where NVRTC is not installed.
"""

from __future__ import annotations

import ctypes
import re
import sys
from importlib import metadata
from pathlib import Path

_NO_COMPILER = 3
_PACKAGE = "nvidia-cuda-nvrtc-cu12"
_MACHINE_CODE_FOR = (90, 80, 75)
_PTX_FOR = 70
_TEMPLATE = """// Written by csrc/compile_kernels.py.
#include <array>

#include "device/kernel_images.hpp"

namespace pyint8 {{
namespace {{

{arrays}
constexpr std::array<KernelImage, {count}> images = {{{{{images}}}}};

}}  // namespace

std::span<const KernelImage> kernel_images() {{ return images; }}

}}  // namespace pyint8
"""


def find_nvrtc() -> Path | None:
    """The library inside the installed package; None where the package is not installed."""
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name.startswith("libnvrtc.so")), None)


def included(source: Path) -> dict[str, bytes]:
    """The headers that `source` includes, by the names it includes them by: paths from the core's folder."""
    names = re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE)
    return {name: (source.parents[1] / name).read_bytes() for name in names}


def compile_for(library: Path, source: Path, target: str, output: str) -> bytes:
    """`source` compiled for `target` ("sm_90", "compute_70"): its "CUBIN" or "PTX".

    Raises:
        RuntimeError: With the compiler's log.
    """
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    headers = included(source)
    count, array = len(headers), ctypes.c_char_p * len(headers)
    texts, names = array(*headers.values()), array(*map(str.encode, headers))
    text, name = source.read_bytes(), source.name.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, count, texts, names) != 0:
        raise RuntimeError("nvrtcCreateProgram failed")
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={target}".encode(), b"--std=c++17")
    failed = nvrtc.nvrtcCompileProgram(program, len(options), options)
    kind = "ProgramLog" if failed else output
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, result)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"kernels.cu does not compile for {target}:\n{result.value.decode()}")
    return result.raw  # PTX ends with a zero byte, as the driver wants it


def compile_all(library: Path, source: Path) -> dict[int, bytes]:
    """Images by architecture, the PTX last, as 0."""
    images = {number: compile_for(library, source, f"sm_{number}", "CUBIN") for number in _MACHINE_CODE_FOR}
    return {**images, 0: compile_for(library, source, f"compute_{_PTX_FOR}", "PTX")}


def as_source(images: dict[int, bytes]) -> str:
    """A C++ file that holds the images."""
    arrays = "".join(
        f"alignas(16) constexpr unsigned char image_{number}[] = {{{','.join(map(str, image))}}};\n"
        for number, image in images.items()
    )
    list_of_images = ", ".join(f"{{{number}, image_{number}}}" for number in images)
    return _TEMPLATE.format(arrays=arrays, count=len(images), images=list_of_images)


def main(source: Path, output: Path) -> int:
    library = find_nvrtc()
    output.write_text(as_source({} if library is None else compile_all(library, source)))
    return _NO_COMPILER if library is None else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
