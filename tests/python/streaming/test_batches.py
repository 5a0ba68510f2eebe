"""Small tensors that land together: each is the bytes that lie in the file, cast in one operation for all."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from streams import CPU, MIB, TINY, Spec, bytes_of, over, stored, unstamped, write

from pyint8 import StreamOptions
from pyint8.checkpoint import Checkpoint, Entry
from pyint8.errors import TruncatedError
from pyint8.report import Recorder
from pyint8.streaming.early import EarlyTensor
from pyint8.streaming.head_start import HeadStart
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.transport import ReadRequest

pytestmark = pytest.mark.usefixtures("nothing_left")

EXPERTS: dict[str, Spec] = {
    **{f"gate.{number}": ("BF16", (16, 64)) for number in range(100)},  # 2 KiB each; a batch has 128 KiB at most
    **{f"up.{number}": ("BF16", (64, 16)) for number in range(3)},
    "other": ("BF16", (64, 16)),
    "alone": ("F32", (5,)),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write(tmp_path_factory.mktemp("experts") / "model.safetensors", EXPERTS)


def in_batches(experts: Mapping[str, Entry]) -> list[TensorRequest]:
    return [TensorRequest(entry, CPU, batch="b" if name == "other" else "a") for name, entry in experts.items()]


def test_batches_land_together_and_are_cast_at_once(experts: Checkpoint) -> None:
    memory: dict[int, list[str]] = {}
    kept = []
    with open_stream(in_batches(experts), TINY) as stream:
        for name, entry in experts.items():
            tensor = stream.batched(name, torch.float64)
            kept.append(tensor)
            memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
            expected = torch.frombuffer(bytearray(stored(entry)), dtype=entry.torch_dtype).view(entry.torch_shape)
            assert tensor.is_contiguous()
            assert torch.equal(tensor.nan_to_num(nan=0.5), expected.double().nan_to_num(nan=0.5))
    names = list(EXPERTS)
    assert list(memory.values()) == [names[:64], names[64:100], names[100:103], ["other"], ["alone"]]


def test_a_batch_in_any_order(experts: Checkpoint) -> None:
    names = list(EXPERTS)
    random.Random(0).shuffle(names)
    recorder = Recorder()
    with open_stream(in_batches(experts), TINY, recorder=recorder) as stream:
        for name in names:
            assert bytes_of(stream.batched(name, experts[name].torch_dtype)) == stored(experts[name])
    assert recorder.report.checkpoint_bytes == recorder.report.engine["bytes_delivered"] == experts.nbytes


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_not_contiguous_is_in_no_batch(experts: Checkpoint, number: int) -> None:
    entries = [experts[f"gate.{number}"] for number in range(3)]
    entries[number] = replace(entries[number], stride=(1, 16))
    with open_stream([TensorRequest(entry, CPU, batch="a") for entry in entries], TINY) as stream:
        found = [stream.batched(entry.name, torch.bfloat16) for entry in entries]
    for entry, tensor in zip(entries, found, strict=True):
        elements = torch.frombuffer(bytearray(stored(entry)), dtype=torch.bfloat16)
        assert bytes_of(tensor) == bytes_of(entry.shaped(elements))


def test_what_landed_early_is_in_no_batch(experts: Checkpoint) -> None:
    start = HeadStart([CPU], TINY)
    transport, early, _ = start.take()
    lane = transport.lane(CPU)
    entry = experts["gate.7"]
    storage = torch.UntypedStorage(entry.nbytes)
    ticket = transport.submit(lane, [ReadRequest(entry.path, entry.offset, entry.nbytes, storage, stamp=entry.stamp)])
    early[entry.name] = EarlyTensor(entry, lane, storage, ticket)
    with over(in_batches(experts), transport, early) as stream:
        found = {name: stream.batched(name, experts[name].torch_dtype) for name in experts}
        for name, tensor in found.items():
            assert bytes_of(tensor) == stored(experts[name])
        assert found["gate.7"].untyped_storage().nbytes() == entry.nbytes
        assert found["gate.6"].untyped_storage().nbytes() == 7 * entry.nbytes


def test_an_error_names_the_tensor_of_a_batch(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x", EXPERTS)
    cut = checkpoint["gate.70"].offset + 1
    os.truncate(checkpoint.files[0], cut)
    with open_stream(
        in_batches(unstamped(checkpoint)), StreamOptions(threads=1, slot_bytes=8192, host_scratch=MIB)
    ) as stream:
        for name in list(checkpoint)[:64]:
            stream.batched(name, torch.float32)
        with pytest.raises(TruncatedError) as caught:
            stream.batched("gate.64", torch.float32)
        assert (caught.value.tensor, caught.value.offset) == ("gate.70", cut)
