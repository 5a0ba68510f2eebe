"""Tensors that ranks gather whole, into the room that results will take: over the fake driver, as one rank alone."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from local_ranks import on_ranks
from pours import GPU, checkpoint_of, random_weight
from streams import over

from pyint8 import RankError, StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import FileChangedError, TruncatedError
from pyint8.streaming.early import EarlyTensors, ask_early
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.lane import Lane
from pyint8.streaming.made import Made
from pyint8.streaming.pour import Pour
from pyint8.streaming.ranks import pieces, wholes
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import Part, TensorRequest, ToDtype, ToInt8
from pyint8.streaming.transport import Transport

__all__ = ["driver"]  # a fixture

CPU = torch.device("cpu")
OPTIONS = StreamOptions(threads=2, slot_bytes=8192, device_scratch=1 << 20)
LAYERS = 12
SHAPES = {"norm": (1, 100), "up": (300, 256), "a": (100, 256), "b": (100, 256), "t": (200, 310)}
ROOM = 300_000

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


@pytest.fixture(autouse=True)
def small_ones_land_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 4096)
    monkeypatch.setattr(wholes, "_WHOLE_BYTES", ROOM)


@pytest.fixture
def requests(tmp_path: Path) -> list[TensorRequest]:
    """Layers of small norms, weights, one of two parts, and one that is transposed; behind them an embedding."""
    tensors: dict[str, torch.Tensor] = {}
    ways: dict[str, Any] = {}
    int8 = ToInt8(torch.bfloat16)
    for layer in range(LAYERS):
        for name, shape in {
            "norm": (1, 100),
            "up": (300, 256),
            "a": (100, 256),
            "b": (100, 256),
            "t": (200, 310),
        }.items():
            full = f"{layer:02}.{name}"
            tensors[full] = random_weight(*shape, torch.bfloat16, len(tensors))
            ways[full] = {"becomes": int8}
        ways[f"{layer:02}.norm"] = {"becomes": ToDtype(torch.bfloat16)}
        ways[f"{layer:02}.t"] = {"becomes": ToInt8(torch.bfloat16, transposed=True)}
        for number, name in enumerate("ab"):
            part = Part(f"{layer:02}.both", (2, 100, 256), number * 25_600)
            ways[f"{layer:02}.{name}"] = {"becomes": int8, "part": part}
    tensors["embedding"] = random_weight(400, 256, torch.bfloat16, 1)
    ways["embedding"] = {"becomes": ToDtype(torch.bfloat16)}
    entries = checkpoint_of(tmp_path, tensors)
    return [TensorRequest(entries[name], GPU, **ways[name]) for name in tensors]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what landed whole; and no more memory is taken than results take."""
    names: list[str] = []
    kept: list[Any] = []  # the fake's memory is not given back in the order of a GPU's stream
    ask, let_go, fill = EarlyTensors.ask, EarlyTensors.let_go, Pour._fill

    def noting(self: EarlyTensors, some: list[TensorRequest]) -> None:
        names.extend(request.entry.name for request in some if self.bytes_for(request))
        ask(self, some)

    def keeping(self: EarlyTensors, name: str) -> None:
        kept.append(self.get(name))
        let_go(self, name)

    def within(self: Pour, until: int) -> None:
        fill(self, until)
        assert self._made_bytes + self._early.nbytes <= self._budget

    monkeypatch.setattr(EarlyTensors, "ask", noting)
    monkeypatch.setattr(EarlyTensors, "let_go", keeping)
    monkeypatch.setattr(Pour, "_fill", within)
    return names


def bytes_of_all(made: dict[str, Made | None]) -> dict[str, list[bytes]]:
    kinds = {name: (each.tensor, each.scales, each.marks) for name, each in made.items() if each is not None}
    return {
        name: [kind.contiguous().view(torch.uint8).numpy().tobytes() for kind in each if kind is not None]
        for name, each in kinds.items()
    }


def pour(
    driver: FakeDriver, requests: list[TensorRequest], ranks: Ranks | None
) -> tuple[dict[str, list[bytes]], float]:
    with open_stream(requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer, ranks=ranks) as stream:
        made = {request.entry.name: stream.made(request.entry.name) for request in requests}
        stream.finish()
        driver.synchronize(0)
        return bytes_of_all(made), stream._transport.stats()["bytes_delivered"]


@pytest.mark.parametrize("size", [2, 3])
def test_what_becomes_of_them(driver: FakeDriver, requests: list[TensorRequest], asked: list[str], size: int) -> None:
    alone, all_bytes = pour(driver, requests, None)
    assert asked == []
    assert len(alone) == len(requests)
    found = on_ranks(size, lambda ranks, _: pour(driver, requests, ranks), lambda: driver.synchronize(0))
    for made, nbytes in found:
        assert made == alone
        assert all_bytes / size <= nbytes < all_bytes / size * 1.01 + 4096
    assert size * 20 < len(asked) < size * LAYERS * 4
    assert all(asked.count(name) == size for name in asked)


@pytest.mark.parametrize("early", [5, 12])
def test_behind_a_head_start(
    driver: FakeDriver, requests: list[TensorRequest], asked: list[str], early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 10_000)
    alone, all_bytes = pour(driver, requests, None)
    entries = [request.entry for request in requests]
    nbytes = sum(sorted((entry.nbytes for entry in entries), reverse=True)[:early])

    def load(ranks: Ranks, _: int) -> tuple[dict[str, list[bytes]], float]:
        lanes: dict[str, Lane] = {}

        def opener(engine: _core.Engine, _: torch.device, options: StreamOptions) -> Lane:  # torch calls it the CPU's
            return lanes.setdefault("GPU", lanes.get("GPU") or driver.lane(engine, GPU, options))

        start = HeadStart([CPU], OPTIONS, opener=opener, ranks=ranks)
        start.begin([FirstTensors(CPU, entries, nbytes)])
        transport, begun, _ = start.take()
        assert begun
        with over(requests, transport, begun, quantizer=driver.quantizer) as stream:
            made = {name: stream.made(name) or Made(stream.whole(name)) for name in alone}
            stream.finish()
            driver.synchronize(0)
            return bytes_of_all(made), transport.stats()["bytes_delivered"]

    for made, delivered in on_ranks(2, load, lambda: driver.synchronize(0)):
        assert made.keys() == alone.keys()
        assert [name for name in alone if made[name] != alone[name]] == []
        assert all_bytes / 2 <= delivered < all_bytes / 2 * 1.01 + 4096
    assert len(asked) > 10


def test_memory_that_is_read_into_outlives_who_asked(requests: list[TensorRequest]) -> None:
    """Until all is closed: an error may come before what was asked for."""
    transport = Transport(OPTIONS)
    asked = EarlyTensors(transport, transport.open_lane(CPU), {}, {request.entry.name for request in requests})
    asked.ask(requests)
    memory = [weakref.ref(tensor.storage) for tensor in asked._tensors.values()]
    asked.let_go(requests[0].entry.name)
    asked.clear()
    assert [each() is not None for each in memory] == [False] + [True] * (len(requests) - 1)
    transport.close()
    assert not any(each() is not None for each in memory)


def test_memory_of_what_another_rank_has_no_room_for_is_given_back(requests: list[TensorRequest]) -> None:
    """Though this rank has begun to read it."""
    entries = [request.entry for request in requests]

    def load(ranks: Ranks, rank: int) -> list[bool]:
        transport = ranks.transport(OPTIONS)
        lane = transport.open_lane(CPU)
        wanted = [(entry, torch.UntypedStorage(entry.nbytes)) for entry in entries[: 2 if rank else None]]
        memory = [weakref.ref(storage) for _, storage in wanted]
        early = ask_early(transport, lane, wanted)
        del wanted
        found = [each() is not None for each in memory]
        transport.discard({tensor.entry.name: tensor for tensor in early})
        transport.close()
        return found

    assert on_ranks(2, load) == [[True] * 2 + [False] * (len(entries) - 2), [True] * 2]


def test_a_file_that_ends_on_one_rank(
    driver: FakeDriver, requests: list[TensorRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once such a tensor is asked for: nobody waits."""
    path = Path(requests[0].entry.path)
    (tmp_path / "of rank 1").mkdir()
    other = tmp_path / "of rank 1" / path.name
    other.write_bytes(path.read_bytes())
    theirs = open_checkpoint(other)
    cut = theirs["04.up"]
    ask = EarlyTensors.ask

    def cutting(self: EarlyTensors, some: list[TensorRequest]) -> None:
        if any(request.entry.name == cut.name and self.bytes_for(request) for request in some):
            os.truncate(other, cut.offset + 10)
        ask(self, some)

    def load(ranks: Ranks, rank: int) -> Any:
        mine = [r._replace(entry=replace(theirs[r.entry.name], stamp=None)) for r in requests] if rank else requests
        return pour(driver, mine, ranks)

    monkeypatch.setattr(EarlyTensors, "ask", cutting)
    first, second = on_ranks(2, load, lambda: driver.synchronize(0))
    assert isinstance(second, (TruncatedError, FileChangedError)), second
    assert isinstance(first, RankError), first
    assert str(first) == f"rank 1 of 2 failed: {type(second).__name__}: {second}"
