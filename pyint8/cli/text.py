"""How values are printed for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pyint8.report import readable_size

if TYPE_CHECKING:
    from pyint8.operations.inspect import Inspection

WIDTH = 12


def field(name: str, value: str) -> str:
    """A line of a name and its value."""
    return f"{name:<{WIDTH}}{value}"


def sizes(nbytes: Mapping[str, int]) -> str:
    """Largest first: "BF16 1.05 GB, F32 66 kB"."""
    return ", ".join(f"{kind} {readable_size(size)}" for kind, size in sorted(nbytes.items(), key=lambda kv: -kv[1]))


def devices(found: Inspection) -> Iterator[str]:
    """A line for each device: what of the model is on it, and what is left."""
    for name, memory in found.device_memory.items():
        used = found.device_bytes.get(name, 0)
        label = f"GPU {name}" if name.isdecimal() else name
        left = f"{readable_size(memory - used)} of {readable_size(memory)} left" if used <= memory else "too much"
        yield field(label, f"{readable_size(used)} ({left})")
    for name in found.device_bytes.keys() - found.device_memory.keys():
        yield field(name, readable_size(found.device_bytes[name]))


def verdict(found: Inspection) -> str:
    return field("fits", "yes" if found.fits else f"no: {found.problem}")
