"""GPUs as nvidia-smi and the kernel describe them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyint8.host.gpus import Gpu, Link, gpus, gpus_on_the_bus

Says = Callable[..., None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Puts a program of that name on PATH: nvidia_smi("a line", code=0)."""

    def say(*lines: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return say


def test_what_nvidia_smi_says(nvidia_smi: Says) -> None:
    nvidia_smi(
        "0, GPU-8b1f, NVIDIA H100 PCIe, 570.86.15, 81559, 80995, 1, 5, 16, 16",
        "1, [N/A], Old, 470.1, [N/A], [N/A], 3, 3, [N/A], 16",
    )
    first, second = gpus()
    link = Link(generation=1, most_generation=5, width=16, most_width=16)
    assert first == Gpu(0, "8b1f", "NVIDIA H100 PCIe", "570.86.15", 81559 << 20, 80995 << 20, link)
    assert 60 < link.gigabytes_per_second < 64
    assert not first.has_old_driver
    assert (second.memory_bytes, second.free_bytes, second.link) == (None, None, None)
    assert second.has_old_driver


def test_an_nvidia_smi_that_fails_or_is_absent(nvidia_smi: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("NVIDIA-SMI has failed", code=9)
    assert gpus() == []
    monkeypatch.setenv("PATH", "")
    assert gpus() == []


def test_gpus_that_the_kernel_sees(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "d").mkdir()  # gone meanwhile
    assert gpus_on_the_bus(tmp_path) == 1
    assert gpus_on_the_bus(tmp_path / "absent") == 0
