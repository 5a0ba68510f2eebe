"""Several devices fed at once, each by a thread of its own: with the CPU under two names, to need no GPU."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from collected import of_kinds
from oracle import SERIALIZABLE, compare_models, compare_outputs, peer_load, show
from safetensors.torch import load_file, save_file
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import errors
from pyint8.models.assembly import Assembly
from pyint8.models.transformers import parameters
from pyint8.models.transformers.compat import SkipParameters
from pyint8.models.transformers.device_worker import DeviceWorker
from pyint8.models.transformers.parameters import ParameterMaker
from pyint8.streaming.early import EarlyTensor
from pyint8.streaming.head_start import Begun
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import ReadRequest, Transport

pytestmark = pytest.mark.usefixtures("nothing_left", "two_devices")

KWARGS: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float16}


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every other target goes to the CPU by another name; returns the names of the threads that made parameters."""
    landing, make = ParameterMaker._landing_device, ParameterMaker._make
    seen: set[str] = set()

    def landing_device(self: ParameterMaker, target: Any) -> torch.device:
        number = list(self._plan.targets).index(target.name) % 2
        return torch.device("cpu", 0) if number and landing(self, target).type == "cpu" else landing(self, target)

    def noting(self: ParameterMaker, name: str, *args: Any, **kwargs: Any) -> Any:
        seen.add(threading.current_thread().name)
        return make(self, name, *args, **kwargs)

    monkeypatch.setattr(ParameterMaker, "_landing_device", landing_device)
    monkeypatch.setattr(ParameterMaker, "_make", noting)
    monkeypatch.setattr(parameters, "_are_several_gpus", lambda devices: len(devices) > 1)
    return seen


@pytest.mark.parametrize("checkpoint", ["bf16", PREQUANTIZED])
@pytest.mark.parametrize("name", ["llama_sharded", "llama_tied", "gpt2", "mixtral", "qwen3_moe", "t5"])
def test_the_same_model(name: str, checkpoint: str, checkpoints: CheckpointStore, two_devices: set[str]) -> None:
    model = ZOO[name]
    folder = checkpoints.folder(model, checkpoint)
    theirs, _ = peer_load(folder, model.cls, **KWARGS)
    ours, report = pyint8.load(folder, model=model.cls, return_report=True, **KWARGS)
    allowed = [SERIALIZABLE, "modules//attributes/_weight_conversions*"]
    found = compare_models(ours, theirs, allow=allowed) + compare_outputs(ours, theirs, model.inputs(theirs))
    assert not found, show(found)
    assert two_devices == {"pyint8 cpu", "pyint8 cpu:0"}
    assert report.checkpoint_bytes == report.engine["bytes_delivered"]


def test_what_landed_where_nothing_goes_is_waited_for(
    checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory must not be given back while the bus still writes to it."""
    take, discard = Preparation.take_over, Transport.discard
    waited: list[str] = []

    def with_another(self: Preparation, gpus: int, wanted: Any) -> Begun:
        transport, early, _ = take(self, gpus, wanted)
        assert self.checkpoint is not None
        entry = next(iter(self.checkpoint.values()))
        lane = transport.open_lane(torch.device("cpu"))
        storage = torch.UntypedStorage(entry.nbytes)
        ticket = transport.submit(lane, [ReadRequest(entry.path, entry.offset, entry.nbytes, storage)])
        lane.device = torch.device("cpu", 7)
        return Begun(transport, early | {entry.name: EarlyTensor(entry, lane, storage, ticket)})

    def noting(self: Transport, early: dict[str, EarlyTensor]) -> None:
        waited.extend(str(tensor.lane.device) for tensor in early.values())
        discard(self, early)
        assert not early

    monkeypatch.setattr(Preparation, "take_over", with_another)
    monkeypatch.setattr(Transport, "discard", noting)
    pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), **KWARGS)
    assert waited == ["cpu:7"]


@pytest.fixture
def spoiled(copy_of: Any) -> Path:
    folder: Path = copy_of("llama", "bf16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_bad_weight_is_found(spoiled: Path) -> None:
    with pytest.raises(errors.NonFiniteWeightError, match="row 3 has NaN") as caught:
        pyint8.load(spoiled, **KWARGS)
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"


def test_an_error_on_a_thread_is_that_of_the_load(copy_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("llama", "bf16")
    file = folder / "model.safetensors"
    size = os.path.getsize(file)
    build, opened = ParameterMaker.__init__, Transport.file

    def cut(*args: Any) -> int:
        number = opened(*args)
        os.truncate(file, size - 5000)
        return number

    def begin(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        time.sleep(0.5)  # the workers have come to the end
        os.truncate(file, size)  # so that transformers, which looks at the header, does not mind

    monkeypatch.setattr(Transport, "file", cut)
    monkeypatch.setattr(ParameterMaker, "__init__", begin)
    with pytest.raises(errors.FileChangedError) as caught:
        pyint8.load(folder, **KWARGS)
    assert caught.value.path == str(file)


def test_a_failed_load_leaves_nothing_for_the_garbage_collector(copy_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("llama_sharded", "bf16")
    monkeypatch.setattr(Assembly, "make", fail)
    kinds = (DeviceWorker, TensorStream)
    gc.collect()
    before = of_kinds(kinds)  # the last failure of another test keeps what it was about
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="in between"):
            pyint8.load(folder, **KWARGS)
        left = of_kinds(kinds, but=before)
    finally:
        gc.enable()
    assert left == []


def fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("in between")


@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_ends_all_threads(checkpoints: CheckpointStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), **KWARGS)


def test_a_conversion_that_fails_takes_no_other_with_it() -> None:
    def make(name: str) -> dict[str, torch.Tensor]:
        if name == "bad":
            raise SkipParameters
        return {name: torch.ones(1)}

    worker = DeviceWorker(torch.device("cpu"), ["bad", "good"], make)
    with pytest.raises(SkipParameters):
        worker.take("bad")
    assert worker.take("good").keys() == {"good"}
    worker.stop()
