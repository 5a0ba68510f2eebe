"""What the doctor finds, of this machine and of others that are made up."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyint8.errors import ReadError
from pyint8.host.gpus import Gpu, Link
from pyint8.host.limits import FileSystem
from pyint8.operations import doctor, machine
from pyint8.operations.doctor import examine
from pyint8.report.finding import Finding

H100 = Gpu(0, "8b1f", "H100", "570.1", 80 << 30, 79 << 30, Link(5, 5, 16, 16))


def found(path: Path | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(path)}


def state_of(name: str) -> tuple[str, bool, bool]:
    """(state, whether it says what that means, whether it says how to mend it)."""
    finding = found()[name]
    return finding.state, finding.consequence is not None, finding.mend is not None


@pytest.fixture
def these_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(*gpus: Gpu, on_bus: int = 0) -> None:
        monkeypatch.setattr(doctor, "gpus", lambda: list(gpus))
        monkeypatch.setattr(doctor, "gpus_on_the_bus", lambda: on_bus)

    return pretend


def test_this_machine_works() -> None:
    findings = found()
    assert not [each for each in findings.values() if each.state == "broken"]
    assert findings["torch"].facts["version"] == metadata.version("torch")
    assert findings["CPUs"].facts["usable"] >= 1
    assert findings["memory"].facts["available"] > 0
    assert findings["torch at work"].facts["gpus"] == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps([each.to_dict() for each in findings.values()]))


def test_what_needs_no_torch_comes_first() -> None:
    program = """
import sys
from pyint8.operations.doctor import examine
heavy = {"torch", "transformers", "bitsandbytes", "numpy", "accelerate"}
for finding in examine():
    print(finding.name, sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [line.rsplit(" [", 1) for line in done.stdout.splitlines()]
    names = [name for name, _ in lines]
    light = names[: names.index("torch at work")]
    assert {"torch", "transformers", "CPUs", "memory", "memlock", "extension"} < set(light)
    assert all(imported == "]" for name, imported in lines if name in light)


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "state"), [(None, "broken"), ("5.7.1", "broken"), ("5.23.0", "ok"), ("5.99.0", "unknown")]
)
def test_versions(version: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version_of(name: str) -> str:
        if name == "transformers" and version is None:
            raise metadata.PackageNotFoundError(name)
        return version or "" if name == "transformers" else "1.0"

    monkeypatch.setattr(metadata, "requires", lambda _: ["transformers>=5.8,<6", 'absent>=1; python_version < "3"'])
    monkeypatch.setattr(metadata, "version", version_of)
    pyint8, transformers = machine.look_at_packages()
    assert pyint8.state == "ok"
    assert transformers.state == state
    assert (transformers.mend is not None) == (state == "broken")
    if state == "broken":
        assert transformers.mend == '`pip install "transformers<6,>=5.8"`'


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert [each.state for each in machine.look_at_packages()] == ["broken"]


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "state"), [(3, "slow"), (4, "ok")])
def test_cpus(count: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: count)
    assert state_of("CPUs") == (state, state == "slow", state == "slow")


@pytest.mark.parametrize(
    ("limit", "available", "state"),
    [(None, 8 << 30, "ok"), (1 << 30, 8 << 30, "slow"), (16 << 30, 1 << 30, "slow"), (4 << 30, 8 << 30, "ok")],
)
def test_memory(limit: int | None, available: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: limit)
    monkeypatch.setattr(machine, "available_memory", lambda: available)
    assert state_of("memory") == (state, state == "slow", state == "slow")


@pytest.mark.parametrize(("limit", "is_said"), [(None, False), (1 << 40, False), (65536, True)])
def test_memlock(limit: int | None, is_said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "lockable_bytes", lambda: limit)
    assert state_of("memlock") == ("ok", is_said, is_said)


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_no_gpu(these_gpus: Callable[..., None]) -> None:
    these_gpus()
    assert state_of("GPU") == ("ok", False, False)


def test_a_gpu_without_a_driver(these_gpus: Callable[..., None]) -> None:
    these_gpus(on_bus=2)
    assert state_of("GPU") == ("broken", True, True)


def test_a_gpu_that_torch_does_not_open(these_gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    these_gpus(H100)
    assert state_of("GPU 0") == state_of("link of GPU 0") == ("ok", False, False)
    assert state_of("torch at work") == ("slow", True, True)


def test_an_old_driver_and_a_narrow_link(these_gpus: Callable[..., None]) -> None:
    these_gpus(Gpu(3, "a", "old", "470.1", None, None, Link(3, 3, 4, 16)), Gpu(4, "b", "mute", "570", None, None, None))
    findings = found()
    assert findings["GPU 3"].state == "broken"
    assert findings["link of GPU 3"].state == "slow"
    assert "25%" in str(findings["link of GPU 3"].consequence)
    assert "link of GPU 4" not in findings


@pytest.mark.parametrize(("speed", "state"), [(54.7, "ok"), (20.0, "slow")])
def test_the_bus(speed: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.streaming.speed.bus_speed", lambda _: speed)
    finding = doctor._bus(1, H100)
    assert (finding.name, finding.state) == ("bus of GPU 0", state)
    assert finding.facts["gigabytes_per_second"] == speed
    assert (finding.mend is not None) == (state == "slow")


def test_a_bus_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("pyint8.streaming.speed.bus_speed", fail)
    assert doctor._bus(0, H100).state == "unknown"


def test_gpus_are_told_apart_by_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's numbers are others than the driver's where CUDA_VISIBLE_DEVICES is set."""
    other = replace(H100, index=1, uuid="77aa")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda ordinal: SimpleNamespace(uuid=["77aa", "x"][ordinal])
    )
    monkeypatch.setattr("pyint8.streaming.speed.bus_speed", lambda _: 50.0)
    assert doctor._described(0, [H100, other]) is other
    assert doctor._described(1, [H100, other]) is None
    assert doctor._bus(1, None).name == "bus of cuda:1"


@pytest.mark.parametrize(("has_gpu", "address", "state"), [(False, None, "ok"), (True, None, "slow"), (True, 7, "ok")])
def test_the_entry_point(has_gpu: bool, address: int | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.quantizer.find_entry_point", lambda: address)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    finding = doctor._entry_point()
    assert (finding.state, finding.facts["entry_point"]) == (state, address is not None)


@pytest.mark.parametrize("has_kernels", [True, False])
def test_kernels(has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8._core.has_kernels", lambda: has_kernels)
    assert state_of("extension") == (("ok" if has_kernels else "slow"), not has_kernels, not has_kernels)


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(os.urandom(1 << 20) * 33)
    return tmp_path / "weights"


def test_storage_is_measured(weights: Path) -> None:
    findings = found(weights)
    assert findings["file system"].facts["kind"] != "unknown"
    cache = findings["page cache"]
    assert cache.facts["gigabytes_per_second"] > 0.1
    disk = findings["disk"]
    assert disk.state == "unknown" or disk.facts["gigabytes_per_second"] > 0


def test_a_slow_disk_on_a_network(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "file_system", lambda _: FileSystem("nfs4", "server:/models", True))
    monkeypatch.setattr(machine, "read_by_threads", lambda *_, **__: 0.5)
    monkeypatch.setattr(machine, "takes_direct_reads", lambda _: True)
    findings = found(weights)
    assert [findings[name].state for name in ("file system", "disk", "page cache")] == ["slow"] * 3
    assert findings["disk"].consequence == "a cold checkpoint of 16 GB takes 32 s"
    assert "pyint8 convert" in str(findings["disk"].mend)


def test_a_warm_file_without_direct_reads_says_nothing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.read_bytes()
    monkeypatch.setattr(machine, "takes_direct_reads", lambda _: False)
    monkeypatch.setattr(machine, "is_cached", lambda *_: True)
    assert found(weights)["disk"].state == "unknown"


def test_too_little_to_measure(tmp_path: Path) -> None:
    assert found(tmp_path)["storage"].state == "unknown"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="no such file"):
        found(tmp_path / "absent")
