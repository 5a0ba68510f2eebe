"""scikit-build-core, but NVRTC is required only where nothing has compiled the kernels before.

A source distribution carries them compiled (csrc/prebuilt), so that building from one needs neither NVRTC nor a
network, on any architecture. A clone does not, and requires NVRTC where there is a package of it.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import compile_kernels
from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None

_SOURCE = Path("csrc/core/device/kernels.cu")  # frontends call from the root of the source tree
_PREBUILT = Path("csrc/prebuilt/kernel_images.cpp")
# For each machine the oldest that there is, whose PTX the oldest drivers take (see compile_kernels).
_NVRTC = {"x86_64": "12.0.140", "aarch64": "12.3.107"}


def _compiler() -> list[str]:
    version = _NVRTC.get(platform.machine())
    if version is None or platform.system() != "Linux" or compile_kernels.is_current(_PREBUILT, _SOURCE):
        return []
    return [f"nvidia-cuda-nvrtc-cu12=={version}"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_build.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_build.get_requires_for_build_editable(config_settings), *_compiler()]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return [*_build.get_requires_for_build_sdist(config_settings), *_compiler()]


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """The source distribution with the kernels compiled; in a clone they are gone again afterwards.

    Raises:
        RuntimeError: Nothing here compiles them: every build from such a distribution would lack them.
    """
    here_before = compile_kernels.is_current(_PREBUILT, _SOURCE)
    if not here_before and compile_kernels.write(_SOURCE, _PREBUILT) != 0:
        _PREBUILT.unlink()
        raise RuntimeError("a source distribution holds the GPU kernels: pip install nvidia-cuda-nvrtc-cu12")
    try:
        name: str = _build.build_sdist(sdist_directory, config_settings)
        return name
    finally:
        if not here_before:
            _PREBUILT.unlink()
