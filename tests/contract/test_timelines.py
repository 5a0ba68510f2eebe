"""The timeline of a load: all bytes are in it, all threads, and nothing outside of the load's time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver, driver
from safetensors.torch import save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.report import Recorder, Timeline
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToInt8

__all__ = ["driver"]  # a fixture

OPTIONS = StreamOptions(timeline=True, threads=3, slot_bytes=8192, device_scratch=1 << 20)


def nbytes(timeline: Timeline, what: str) -> int:
    return sum(span.nbytes for span in timeline.spans if span.what == what)


@pytest.mark.parametrize("name", ["llama_sharded", "gpt2", "mixtral"])
def test_of_a_load(name: str, checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO[name], "bf16")
    start = time.perf_counter()
    _, report = pyint8.load(folder, "cpu", options=OPTIONS, return_report=True)
    end = time.perf_counter()
    timeline = report.timeline
    assert timeline is not None
    assert nbytes(timeline, "reading") == report.engine["bytes_read"]
    assert {span.what for span in timeline.lanes()["Python"]} >= {"read headers", "build", "stream", "finish"}
    assert all(start <= span.begin <= span.end <= end for span in timeline.spans)


def test_of_a_conversion(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    folder = checkpoints.folder(ZOO["llama_sharded"], "bf16")
    report = pyint8.convert(folder, tmp_path / "int8", device="cpu", options=OPTIONS)
    assert report.timeline is not None
    assert nbytes(report.timeline, "reading") == report.engine["bytes_read"]


def test_of_a_reload(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama_sharded"], "bf16")
    report = pyint8.reload(pyint8.load(folder, "cpu"), folder, options=OPTIONS)
    assert report.timeline is not None
    assert nbytes(report.timeline, "reading") == report.engine["bytes_read"]


def test_of_plain_modules(tmp_path: Path) -> None:
    save_file({"0.weight": torch.rand(64, 64), "0.bias": torch.rand(64)}, tmp_path / "model.safetensors")
    module = torch.nn.Sequential(torch.nn.Linear(64, 64))
    _, report = pyint8.load(tmp_path / "model.safetensors", "cpu", model=module, options=OPTIONS, return_report=True)
    assert report.timeline is not None
    assert nbytes(report.timeline, "reading") == 64 * 65 * 4


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
def test_of_buses_and_gpus(driver: FakeDriver, tmp_path: Path) -> None:
    weights = {f"{number}": torch.rand(300, 200) for number in range(9)}
    save_file(weights, tmp_path / "model.safetensors")
    entries = open_checkpoint(tmp_path / "model.safetensors")
    gpus = [torch.device("cuda", number) for number in range(2)]
    recorder = Recorder(timeline=True)
    requests = [
        TensorRequest(entry, gpus[number % 2], True, becomes=ToInt8(torch.float16))
        for number, entry in enumerate(entries.values())
    ]
    with open_stream(requests, OPTIONS, recorder=recorder, opener=driver.lane, quantizer=driver.quantizer) as stream:
        made = [stream.made(request.entry.name) for request in requests]
        stream.finish()
    assert all(made)
    timeline = recorder.report.timeline
    assert timeline is not None
    total = sum(weight.nbytes for weight in weights.values())
    assert {what: nbytes(timeline, what) for what in ("reading", "copying", "quantizing")} == dict.fromkeys(
        ("reading", "copying", "quantizing"), total
    )


def test_none_unless_it_is_asked_for(checkpoints: CheckpointStore) -> None:
    _, report = pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu", return_report=True)
    assert report.timeline is None
    assert report.to_dict()["timeline"] is None
