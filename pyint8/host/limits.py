"""What this process may use: memory of its cgroup, memory that it may lock, and the file system below a path."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 1 << 60  # cgroups of version 1 have a number near 2^63 for it

_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "ceph", "gpfs", "beegfs", "glusterfs", "fuse", "virtiofs")


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process's cgroup may take, version 2 or 1, or one above it; None without a limit."""
    limits = [int(text) for file in _limit_files(root, own) if (text := _text(file)).isdecimal()]
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def _limit_files(root: Path, own: Path) -> Iterator[Path]:
    for line in _text(own).splitlines():
        number, controllers, path = line.split(":", 2)
        above = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        if number == "0":
            yield from (root / folder / "memory.max" for folder in above)
        elif "memory" in controllers.split(","):
            yield from (root / "memory" / folder / "memory.limit_in_bytes" for folder in above)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def lockable_bytes() -> int | None:
    """Bytes that this process may lock in memory (`ulimit -l`); None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


class FileSystem(NamedTuple):
    """Where a path lies.

    Attributes:
        kind: Such as "ext4"; "unknown" where the system does not say.
        device: What is mounted there.
        is_remote: Whether it is one over a network, or of the host of a virtual machine.
    """

    kind: str
    device: str
    is_remote: bool


def file_system(path: str, mounts: Path = Path("/proc/self/mounts")) -> FileSystem:
    """The file system with the longest mount point above a path."""
    inside = os.path.realpath(path)
    found = FileSystem("unknown", "unknown", False)
    longest = -1
    for line in _text(mounts).splitlines():
        device, point, kind = line.split(" ", 3)[:3]
        point = point.encode().decode("unicode_escape")  # blanks are \040
        if len(point) >= longest and os.path.commonpath([inside, point]) == point:
            longest = len(point)
            found = FileSystem(kind, device, kind.partition(".")[0] in _REMOTE)
    return found
