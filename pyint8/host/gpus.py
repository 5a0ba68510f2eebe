"""NVIDIA GPUs as their driver and the kernel describe them, without torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

LEAST_DRIVER = 525
"""The oldest major version of the driver that the engine works with."""

_FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.free",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
_LINK_FIELDS = 4
# GB/s of one lane of each generation of PCIe, before the packets' headers.
_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
_NVIDIA = "0x10de"
_DISPLAYS = "0x03"
_MIB = 1 << 20


@dataclass(frozen=True)
class Link:
    """A GPU's place on the PCIe bus.

    Attributes:
        generation: At which it runs now; less than it can while the GPU rests.
        most_generation: At which it can, in this machine.
        width: How many lanes it has now.
        most_width: How many it can have.
    """

    generation: int
    most_generation: int
    width: int
    most_width: int

    @property
    def gigabytes_per_second(self) -> float:
        """What its lanes give at the highest generation; 0 for one that is unknown."""
        return _LANE.get(self.most_generation, 0.0) * self.width


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: The driver's number of it, which need not be that of CUDA (CUDA_VISIBLE_DEVICES).
        uuid: What tells it from all others, without "GPU-".
        name: Its product's name.
        driver: The driver's version, such as "570.86".
        memory_bytes: All of its memory.
        free_bytes: What of that is free.
        link: None where the driver does not say.
    """

    index: int
    uuid: str
    name: str
    driver: str
    memory_bytes: int | None
    free_bytes: int | None
    link: Link | None

    @property
    def has_old_driver(self) -> bool:
        major = self.driver.partition(".")[0]
        return major.isdecimal() and int(major) < LEAST_DRIVER


def gpus() -> list[Gpu]:
    """Those that nvidia-smi lists; none where it is missing, or fails."""
    words = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [_gpu([value.strip() for value in line.split(",")]) for line in answer.stdout.splitlines() if line.strip()]


def _gpu(values: list[str]) -> Gpu:
    index, uuid, name, driver, total, free, *link = values
    numbers = [int(value) for value in link if value.isdecimal()]
    return Gpu(
        index=int(index),
        uuid=uuid.removeprefix("GPU-"),
        name=name,
        driver=driver,
        memory_bytes=int(total) * _MIB if total.isdecimal() else None,
        free_bytes=int(free) * _MIB if free.isdecimal() else None,
        link=Link(*numbers) if len(numbers) == _LINK_FIELDS else None,
    )


def gpus_on_the_bus(root: Path = Path("/sys/bus/pci/devices")) -> int:
    """How many NVIDIA GPUs the kernel sees, with or without a driver."""
    return sum(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAYS)
        for device in (root.iterdir() if root.is_dir() else ())
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
