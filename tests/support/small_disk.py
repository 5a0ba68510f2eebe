"""A disk that is soon full: a tmpfs in a namespace of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from torch import nn
import pyint8
from pyint8.errors import WriteError
disk = sys.argv[1]
try:
    {call}
except WriteError as error:
    print(error.errno, error, sep="|")
"""


def on_a_small_disk(tmp_path: Path, call: str, size: str = "1m") -> subprocess.CompletedProcess[str]:
    """Runs `call`, which has a path `disk`, with a disk of `size`; prints errno|error, then what is on the disk."""
    _require_mount()
    disk = tmp_path / "disk"
    disk.mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(call=call))
    script = f"mount -t tmpfs -o size={size} small {disk} && {sys.executable} {program} {disk} && find {disk} -type f"
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=300
    )


def _require_mount() -> None:
    found = shutil.which("unshare")
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "small", "/mnt"]
    if found is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
