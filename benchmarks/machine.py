"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "pyint8",
    "torch",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai-model-streamer",
    "obstore",
)


def describe(folder: Path) -> dict[str, Any]:
    """CPU, memory, GPU and its link, driver, `folder`'s disk, library versions; None for what cannot be found out."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "gpus": _gpus(),
        "disk": _disk(folder),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def first_cpus(count: int) -> list[int]:
    """The first so many of the CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))[:count]


def _cpu() -> str | None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _disk(folder: Path) -> dict[str, Any]:
    """The file system that holds `folder`, by the longest mount point above it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [fields for fields in mounts if folder.absolute().is_relative_to(fields[1])]
    best = max(above, key=lambda fields: len(fields[1]), default=None)
    return {"device": best[0], "file_system": best[2]} if best else {"device": None, "file_system": None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    query = "name,driver_version,pcie.link.gen.max,pcie.link.width.max,memory.total"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return answer.stdout.strip().splitlines()
