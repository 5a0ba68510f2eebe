"""Compile device/kernels.cu with NVRTC and write it as a C++ source file: `compile_kernels.py kernels.cu out.cpp`.

What comes out depends on no CPU and no GPU that is there, so it is compiled once, into the source distribution
(csrc/prebuilt, by csrc/build_backend.py), and builds from that need no compiler for GPUs, on any architecture. Builds
from a clone take NVRTC from its package, which is a build requirement there, or from a CUDA toolkit or conda.

NVRTC 12.0 (a package of 23 MB; no toolkit, headers or GPU needed) writes PTX ISA 8.0 and machine code that
every driver since 525 accepts; nvcc 13 would write ISA 9.0 and need 580. The PTX, for Volta and all that came after,
has to be compiled by the driver where it is new to it; the machine code, for the architectures named here and those of
the same major version, not (docs/performance.md, "First kernels of a process").
Exits with 3, and writes a file without kernels, where there are neither compiled kernels nor NVRTC.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

_NO_COMPILER = 3
_PACKAGE = "nvidia-cuda-nvrtc-cu12"
_MACHINE_CODE_FOR = (90, 80, 75)
_PTX_FOR = 70
# Of a CUDA toolkit, of conda's environment and of conda-build's.
_TOOLKITS = ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "PREFIX")
_LIBRARY = ("lib64/libnvrtc.so*", "lib/libnvrtc.so*", "targets/*/lib/libnvrtc.so*")
_TEMPLATE = """// Written by csrc/compile_kernels.py from sources with the SHA-256 {digest}.
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


def packaged_nvrtc() -> Path | None:
    """The library inside the installed package; None where the package is not installed."""
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name.startswith("libnvrtc.so")), None)


def toolkit_nvrtc() -> Path | None:
    """The library of a CUDA toolkit or of conda, where the environment or the usual path says that there is one."""
    roots = [Path(os.environ[name]) for name in _TOOLKITS if os.environ.get(name)] + [Path("/usr/local/cuda")]
    found = (path for root in roots for pattern in _LIBRARY for path in sorted(root.glob(pattern)))
    return next(found, None)


def included(source: Path) -> dict[str, bytes]:
    """The headers that `source` includes, by the names it includes them by: paths from the core's folder."""
    names = re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE)
    return {name: (source.parents[1] / name).read_bytes() for name in names}


def load(library: Path) -> ctypes.CDLL:
    """NVRTC, and before it the library that it opens by name, which no folder of the system may have."""
    for builtins in sorted(library.parent.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(library))


def compile_for(library: Path, source: Path, target: str, output: str) -> bytes:
    """`source` compiled for `target` ("sm_90", "compute_70"): its "CUBIN" or "PTX".

    Raises:
        RuntimeError: With the compiler's log.
    """
    nvrtc = load(library)
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


def supported(library: Path) -> list[int]:
    """The architectures that this NVRTC compiles for, rising: NVRTC 13 knows no Volta."""
    nvrtc = load(library)
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(numbers)
    return sorted(numbers)


def compile_all(library: Path, source: Path) -> dict[int, bytes]:
    """Images by architecture, the PTX last, as 0."""
    known = supported(library)
    machine_code = [number for number in _MACHINE_CODE_FOR if number in known]
    images = {number: compile_for(library, source, f"sm_{number}", "CUBIN") for number in machine_code}
    oldest = min(number for number in known if number >= _PTX_FOR)
    return {**images, 0: compile_for(library, source, f"compute_{oldest}", "PTX")}


def digest(source: Path) -> str:
    """Of all that decides what the kernels are compiled to: their sources, and this file with its options."""
    parts = [source.read_bytes(), *included(source).values(), Path(__file__).read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_current(prebuilt: Path, source: Path) -> bool:
    """Whether `prebuilt` holds the kernels compiled from these very sources."""
    if not prebuilt.is_file():
        return False
    with prebuilt.open() as lines:
        return digest(source) in lines.readline()


def as_source(images: dict[int, bytes], made_from: str) -> str:
    """A C++ file that holds the images, and the digest of what they were made from."""
    arrays = "".join(
        f"alignas(16) constexpr unsigned char image_{number}[] = {{{','.join(map(str, image))}}};\n"
        for number, image in images.items()
    )
    list_of_images = ", ".join(f"{{{number}, image_{number}}}" for number in images)
    return _TEMPLATE.format(digest=made_from, arrays=arrays, count=len(images), images=list_of_images)


def isa(images: dict[int, bytes]) -> str:
    """The version of the PTX: a driver older than it cannot compile that for GPUs newer than the machine code."""
    found = re.search(rb"^\.version (\S+)", images[0], re.MULTILINE)
    return found[1].decode() if found else "unknown"


def write(source: Path, output: Path) -> int:
    """Compiles `source` into `output`; the exit status."""
    library = packaged_nvrtc() or toolkit_nvrtc()
    images = {} if library is None else compile_all(library, source)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(as_source(images, digest(source)))
    if library is None:
        return _NO_COMPILER
    code = ", ".join(f"sm_{number}" for number in images if number)
    print(f"{code} and PTX {isa(images)}, compiled by {library}")
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compile the GPU kernels into a C++ source file.")
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prebuilt", type=Path, help="taken if it is of these sources")
    parser.add_argument("--none", action="store_true", help="write a file without kernels")
    options = parser.parse_args(arguments)
    if options.none:
        options.output.write_text(as_source({}, digest(options.source)))
        return 0
    if options.prebuilt and is_current(options.prebuilt, options.source):
        shutil.copyfile(options.prebuilt, options.output)
        print(f"compiled before, in {options.prebuilt}")
        return 0
    return write(options.source, options.output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
