"""What cgroups, ulimit and the table of mounts say."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pyint8.host.limits import file_system, lockable_bytes, memory_limit


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"memory.max": "5000\n"}, 5000),
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/a/b", {"a/b/memory.max": "9000\n", "a/memory.max": "7000\n"}, 7000),
        ("0::/a/b", {"memory.max": "6000\n"}, 6000),  # in a container the path is the host's
        ("4:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": "3000\n"}, 3000),
        ("4:memory:/", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        ("4:memory:/x\n0::/", {"memory/memory.limit_in_bytes": "8000\n", "memory.max": "9000"}, 8000),
        ("1:cpu:/", {"memory/memory.limit_in_bytes": "1"}, None),
    ],
)
def test_the_memory_of_a_cgroup(own: str, files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(f"{own}\n")
    assert memory_limit(written(tmp_path / "cgroup", files), tmp_path / "own") == expected


def test_no_cgroups(tmp_path: Path) -> None:
    assert memory_limit(tmp_path, tmp_path / "absent") is None


def test_memory_that_may_be_locked() -> None:
    program = (
        "import resource; from pyint8.host.limits import lockable_bytes;"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]));"
        "print(lockable_bytes())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "65536\n"
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert lockable_bytes() == (None if soft == resource.RLIM_INFINITY else soft)


def test_the_file_system_of_a_path(tmp_path: Path) -> None:
    inside, blank = tmp_path / "models" / "llama", tmp_path / "with blank"
    lines = [
        "/dev/vda / ext4 rw 0 0",
        f"server:/models {tmp_path}/models nfs4 rw 0 0",
        f"over {tmp_path}/models fuse.sshfs rw 0 0",  # mounted over the other
        f"/dev/vdb {tmp_path}/mod xfs rw 0 0",
        f"/dev/vdc {str(blank).replace(' ', chr(92) + '040')} btrfs rw 0 0",
    ]
    mounts = tmp_path / "mounts"
    mounts.write_text("\n".join(lines) + "\n")
    assert file_system(str(inside), mounts) == ("fuse.sshfs", "over", True)
    assert file_system(str(tmp_path / "models2"), mounts) == ("ext4", "/dev/vda", False)
    assert file_system(str(blank / "x"), mounts) == ("btrfs", "/dev/vdc", False)
    assert file_system("/", tmp_path / "absent").kind == "unknown"
