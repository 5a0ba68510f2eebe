"""Loads onto the fake driver's GPU, whose memory torch takes for the host's, with experts that are guessed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver
from pours import GPU
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import StreamOptions, _core
from pyint8.models.transformers import loading, parameters
from pyint8.streaming import first_tensors, guessed_pours, guesses
from pyint8.streaming.head_start import HeadStart
from pyint8.streaming.lane import Lane, open_lane
from pyint8.streaming.pour import Pour

CPU = torch.device("cpu")
LOST = "all is read again"
Load = Callable[..., Any]


class WithContext(HeadStart):
    """Of a process that has used the GPU before."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._has_context = True


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many requests a head start had results made, of each load."""
    found: list[int] = []

    def made(*arguments: Any) -> Pour:
        found.append(len(arguments[2]))
        return Pour(*arguments)

    monkeypatch.setattr(guessed_pours, "Pour", made)
    return found


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO[request.param], "bf16")


@pytest.fixture(scope="module", autouse=True)
def default_stream() -> None:
    """The fake's has a thread, which the process keeps from its first use on."""
    if path := os.environ.get("PYINT8_TEST_LIBCUDA"):
        FakeDriver(path).synchronize(0)


@pytest.fixture
def load(folder: Path, nothing_left: None, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`pyint8.load` onto the fake's GPU."""

    opened: list[Lane] = []
    only_gpu = True

    def opener(engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
        if opened and not only_gpu:  # the second is for the host
            return open_lane(engine, device, options)
        opened.append(driver.lane(engine, GPU, options))
        return opened[-1]

    monkeypatch.setattr(first_tensors, "first_gpu", lambda _: (CPU, True))
    monkeypatch.setattr(first_tensors, "HeadStart", partial(WithContext, opener=opener))
    for user in (loading, parameters):
        monkeypatch.setattr(user, "find_entry_point", lambda: driver.quantizer)
    options = StreamOptions(threads=2, slot_bytes=8192, device_scratch=1 << 20)

    def loaded(folder: Path, *, experts: bool | None, skip_modules: Any = None, **arguments: Any) -> Any:
        nonlocal only_gpu
        only_gpu = experts is not None  # int8 forms have a byte for the host with each weight
        config = None if experts is None else pyint8.Int8Config(experts=experts, skip_modules=skip_modules)
        arguments = {"dtype": "auto", "progress": False, "options": options, **arguments}
        model = pyint8.load(folder, {"": "cpu"}, config=config, **arguments)
        driver.synchronize(0)
        opened.clear()
        return model

    return loaded


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes guesses wrong."""
    families = [(second, first, last) for first, second, last in guesses._FAMILIES]
    monkeypatch.setattr(guesses, "_FAMILIES", families)
