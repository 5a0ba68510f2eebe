"""Fixtures that several files share: of tests/python, tests/contract and tests/gpu."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from zoo import CheckpointStore  # not before a test needs it: it takes seconds

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported; no test may look for a network
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background was started to ignore it


@pytest.fixture(scope="session", autouse=True)
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that tests run would import the unbuilt package, were they run inside the source tree."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    from zoo import checkpoint_store

    return checkpoint_store(tmp_path_factory.getbasetemp() / "zoo")


@pytest.fixture
def copy_of(checkpoints: CheckpointStore, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of the zoo that the test may damage: copy_of(name, checkpoint="fp16")."""
    from zoo import ZOO

    def copy(name: str, checkpoint: str = "fp16") -> Path:
        return Path(shutil.copytree(checkpoints.folder(ZOO[name], checkpoint), tmp_path / f"{name}-{checkpoint}"))

    return copy


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretends that packages have these versions; None for absent."""
    from pyint8.host import packages

    def pretend(**versions: str | None) -> None:
        def version(package: str) -> str:
            found = versions.get(package, "1.0.0")
            if found is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        packages.forget_versions()

    yield pretend
    packages.forget_versions()


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, when bytes land for the fifth time."""
    from pyint8.report.progress import ByteProgress

    seen: list[int] = []

    def interrupt(_: object, nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ByteProgress, "advance", interrupt)


@pytest.fixture
def load(checkpoints: CheckpointStore) -> Callable[..., Any]:
    """Loads a model of the zoo in float16 on the CPU: load(name="llama", checkpoint="bf16", **for_pyint8_load)."""
    import torch
    from zoo import ZOO

    import pyint8

    def load_one(name: str = "llama", checkpoint: str = "bf16", folder: Path | None = None, **kwargs: Any) -> Any:
        wanted: dict[str, Any] = {"device_map": "cpu", "dtype": torch.float16} | kwargs
        return pyint8.load(folder or checkpoints.folder(ZOO[name], checkpoint), **wanted)

    return load_one


@pytest.fixture
def peer(checkpoints: CheckpointStore) -> Callable[..., Any]:
    """What transformers loads of the zoo, as `load` does: peer(name="llama", cls=None, **for_bitsandbytes_config)."""
    import torch
    from oracle import peer_load
    from transformers import BitsAndBytesConfig
    from zoo import ZOO

    def load_one(name: str = "llama", cls: type | None = None, **fields: Any) -> Any:
        wanted = {"device_map": "cpu", "dtype": torch.float16}
        wanted["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, **fields)
        return peer_load(checkpoints.folder(ZOO[name], "bf16"), cls or ZOO[name].cls, **wanted)[0]

    return load_one


def _threads() -> set[int]:
    tqdms = {thread.native_id for thread in threading.enumerate() if thread.name == "tqdm_monitor"}  # one a process
    return {int(task) for task in os.listdir("/proc/self/task")} - tqdms


def _descriptors() -> Counter[str]:
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # listdir's own
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


def _has_sockets(descriptors: Counter[str]) -> bool:
    return any(name.startswith("socket:") for name in descriptors)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test if a thread, a file descriptor or pinned memory of pyint8 outlives it."""
    from pyint8 import _core

    _wake_the_pools()
    threads, descriptors, pinned = _threads(), _descriptors(), _core.pinned_bytes_in_use()
    yield
    deadline = time.monotonic() + 2
    while (_threads() - threads or _has_sockets(_descriptors() - descriptors)) and time.monotonic() < deadline:
        time.sleep(0.01)  # a joined thread stays in /proc for a moment; a thread of obstore's closes connections
    more = _threads() - threads
    assert not more, f"threads left: {len(more)}, of Python's: {threading.enumerate()}"
    assert not _descriptors() - descriptors
    assert _core.pinned_bytes_in_use() == pinned


def _wake_the_pools() -> None:
    """torch keeps the threads of its pools, bitsandbytes those of its own OpenMP: let them be there before."""
    import bitsandbytes
    import torch

    large = torch.randn(512, 512)
    bitsandbytes.functional.int8_vectorwise_quant((large @ large).half())
    torch.cat([large.half(), large.half()]).exp_()
