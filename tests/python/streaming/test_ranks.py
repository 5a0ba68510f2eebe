"""Streams whose bytes ranks gather, over the fake driver and in host memory: as one rank alone, byte for byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from local_ranks import on_ranks
from safetensors.torch import save_file
from streams import CPU, bytes_of, over, requests, stored, write

from pyint8 import RankError, StreamOptions, _core
from pyint8.checkpoint import Checkpoint, open_checkpoint
from pyint8.errors import TruncatedError
from pyint8.streaming.head_start import FirstTensors, HeadStart, _allocated
from pyint8.streaming.lane import Lane
from pyint8.streaming.made import Made
from pyint8.streaming.ranks import pieces
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.ranks.transport import _BEFORE_AGREED
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import Part, TensorRequest, ToDtype, ToInt8
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

__all__ = ["driver"]  # a fixture

GPU = torch.device("cuda", 0)
# Bands of 85 KiB.
OPTIONS = StreamOptions(threads=2, slot_bytes=8192, device_scratch=1 << 20, host_scratch=1 << 20)

needs_kernels = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoint_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder / "model.safetensors")


def delivered(transport: Transport) -> float:
    return transport.stats()["bytes_delivered"]


def bytes_in_bands(stream: TensorStream, name: str) -> bytes:
    return b"".join(bytes_of(band) for _, band in stream.bands(name))


def settle(driver: FakeDriver) -> Callable[[], None]:
    return lambda: driver.synchronize(0)


@pytest.fixture
def every_kind(tmp_path: Path) -> list[TensorRequest]:
    """Weights of all sizes and ways, on a GPU."""
    weights = {
        "bands": random_weight(700, 300),
        "transposed": random_weight(500, 260, seed=1),
        "transposed and larger than scratch": random_weight(1200, 500, seed=2),
        "tiny": random_weight(2, 3, seed=3),
        "cast": random_weight(600, 301, torch.float32, 4),
        "vector": random_weight(1, 257, torch.float32, 5)[0],
        "as stored": torch.arange(300_001),
        "part 0": random_weight(300, 200, seed=6),
        "part 1": random_weight(300, 200, seed=7),
    }
    ways: dict[str, Any] = {
        "bands": {"becomes": ToInt8(torch.bfloat16)},
        "tiny": {"becomes": ToInt8(torch.float16)},
        "cast": {"becomes": ToDtype(torch.float16)},
        "vector": {"becomes": ToDtype(torch.bfloat16)},
        "as stored": {"becomes": ToDtype(torch.int64)},
    }
    for number in range(2):
        ways[f"part {number}"] = {
            "becomes": ToDtype(torch.float32),
            "part": Part("fused", (2, 300, 200), number * 60_000),
        }
    entries = checkpoint_of(tmp_path, weights)
    return [
        TensorRequest(entries[name], GPU, **ways.get(name, {"becomes": ToInt8(torch.bfloat16, transposed=True)}))
        for name in weights
    ]


@pytest.fixture(autouse=True)
def small_pieces_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 4096)


def pour(
    driver: FakeDriver, requests: list[TensorRequest], ranks: Ranks | None
) -> tuple[dict[str, Made | None], float]:
    with open_stream(requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer, ranks=ranks) as stream:
        made = {request.entry.name: stream.made(request.entry.name) for request in requests}
        stream.finish()
        return made, delivered(stream._transport)


def same(ours: Made | None, theirs: Made | None) -> bool:
    assert ours is not None
    assert theirs is not None
    pairs = zip((ours.tensor, ours.scales, ours.marks), (theirs.tensor, theirs.scales, theirs.marks), strict=True)
    return all(one is other is None or torch.equal(one, other) for one, other in pairs)  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_a_consumer_makes_of_gathered_bytes(
    driver: FakeDriver, every_kind: list[TensorRequest], size: int
) -> None:
    alone, all_bytes = pour(driver, every_kind, None)
    found = on_ranks(size, lambda ranks, _: pour(driver, every_kind, ranks), settle(driver))
    for made, nbytes in found:
        assert [name for name in alone if not same(made[name], alone[name])] == []
        assert all_bytes / size <= nbytes < all_bytes / size * 1.01 + 4096


@needs_kernels
@pytest.mark.parametrize("few", [1, 64])
@pytest.mark.parametrize("fits", [0, 500_000, 1 << 30])
def test_the_head_start_asks_for_what_fits_on_every_rank(
    driver: FakeDriver, every_kind: list[TensorRequest], fits: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    monkeypatch.setattr("pyint8.streaming.head_start._FIRST_ASKED", few)
    kept: list[Any] = []  # the fake's memory is not given back in the order of a GPU's stream

    def keeping(*arguments: Any) -> Any:
        kept.append(_allocated(*arguments))
        return kept[-1]

    monkeypatch.setattr("pyint8.streaming.head_start._allocated", keeping)
    alone, all_bytes = pour(driver, every_kind, None)
    entries = [request.entry for request in every_kind]

    def load(ranks: Ranks, rank: int) -> tuple[dict[str, Made | None], int, float]:
        lanes: dict[str, Lane] = {}

        def opener(engine: _core.Engine, _: torch.device, options: StreamOptions) -> Lane:  # torch calls it the CPU's
            return lanes.setdefault("GPU", lanes.get("GPU") or driver.lane(engine, GPU, options))

        part = FirstTensors(CPU, entries, (1 << 30) if rank else fits)
        start = HeadStart([CPU], OPTIONS, opener=opener, ranks=ranks)
        start.begin([part])
        transport, early, _ = start.take()
        asked = len(early)
        with over(every_kind, transport, early, quantizer=driver.quantizer) as stream:
            made = {name: stream.made(name) or Made(stream.whole(name)) for name in alone}
            stream.finish()
            driver.synchronize(0)
            return made, asked, delivered(transport)

    found = on_ranks(2, load, settle(driver))
    expected = {0: 0, 500_000: 1, 1 << 30: len(entries)}[fits]
    begun = sum(entry.nbytes for entry in entries[expected:][:_BEFORE_AGREED])  # by the rank that has room
    for rank, (made, asked, nbytes) in enumerate(found):
        assert asked == expected
        assert [name for name in alone if not same(made[name], alone[name])] == []
        assert nbytes < (all_bytes + rank * begun) / 2 * 1.01 + 4096


@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_streams_in_host_memory(mixed: Checkpoint, size: int, in_bands: bool) -> None:
    asked = requests(mixed, in_bands=in_bands)

    def load(ranks: Ranks, _: int) -> tuple[dict[str, bytes], float]:
        with open_stream(asked, OPTIONS, ranks=ranks) as stream:
            found = {name: bytes_in_bands(stream, name) for name in mixed}
            stream.finish()
            return found, delivered(stream._transport)

    for found, nbytes in on_ranks(size, load):
        assert found == {name: stored(entry) for name, entry in mixed.items()}
        assert nbytes < mixed.nbytes / size * 1.01 + 4096


def test_batches_are_pieces(tmp_path: Path) -> None:
    specs = {f"{number}": ("F32", (50, 31)) for number in range(40)}
    checkpoint = write(tmp_path / "x.safetensors", specs)
    asked = [TensorRequest(entry, CPU, batch="all") for entry in checkpoint.values()]

    def load(ranks: Ranks, _: int) -> bool:
        with open_stream(asked, OPTIONS, ranks=ranks) as stream:
            tensors = {name: stream.batched(name, torch.float32) for name in specs}
            stream.finish()
            return all(bytes_of(tensors[name]) == stored(checkpoint[name]) for name in specs)

    assert on_ranks(3, load) == [True] * 3


@pytest.mark.parametrize("taken", [["last", "large"], ["odd"], []])
def test_what_is_taken_out_of_order_or_never_is_no_matter(mixed: Checkpoint, taken: list[str]) -> None:
    def load(ranks: Ranks, _: int) -> list[bytes]:
        with open_stream(requests(mixed, in_bands=True), OPTIONS, ranks=ranks) as stream:
            found = [bytes_in_bands(stream, name) for name in taken]
            stream.finish()
            return found

    assert on_ranks(2, load) == [[stored(mixed[name]) for name in taken]] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_is_all_ranks_error(mixed: Checkpoint, failing: int) -> None:
    def load(ranks: Ranks, rank: int) -> None:
        with open_stream(requests(mixed, in_bands=True), OPTIONS, ranks=ranks) as stream:
            for name in mixed:
                if rank == failing and name == "odd":
                    raise ZeroDivisionError("of this rank")
                list(stream.bands(name))
            stream.finish()

    found = on_ranks(3, load)
    assert isinstance(found[failing], ZeroDivisionError)
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(found[rank], RankError)
        assert found[rank].rank == failing
        assert str(found[rank]) == f"rank {failing} of 3 failed: ZeroDivisionError: of this rank"


def test_a_file_that_ends_too_early_on_one_rank(mixed: Checkpoint, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    whole = Path(mixed["odd"].path)
    shorter = cut / whole.name
    shorter.write_bytes(whole.read_bytes()[: mixed["odd"].offset + 1000])

    def load(ranks: Ranks, rank: int) -> None:
        entries = [replace(e, path=str(shorter), stamp=None) if rank == 1 else e for e in mixed.values()]
        with open_stream([TensorRequest(e, CPU, True) for e in entries], OPTIONS, ranks=ranks) as stream:
            for name in mixed:
                list(stream.bands(name))
            stream.finish()

    found = on_ranks(2, load)
    assert isinstance(found[1], TruncatedError)
    assert found[1].tensor in ("odd", "last")
    assert str(found[0]) == f"rank 1 of 2 failed: TruncatedError: {found[1]}"


@pytest.mark.parametrize(
    ("rank_1", "named"),
    [
        ({"names": ["large"]}, "names, dtypes and shapes"),
        ({"in_bands": True}, "what becomes of them"),
        ({"scratch": 2 << 20}, "scratch, kernels"),
    ],
    ids=str,
)
def test_ranks_that_do_not_do_the_same_are_told(mixed: Checkpoint, rank_1: dict[str, Any], named: str) -> None:
    def load(ranks: Ranks, rank: int) -> None:
        ways = rank_1 if rank == 1 else {}
        entries = {name: mixed[name] for name in ways.get("names", mixed)}
        options = replace(OPTIONS, host_scratch=ways.get("scratch", OPTIONS.host_scratch))
        asked = requests(entries, in_bands=ways.get("in_bands", False))
        with open_stream(asked, options, ranks=ranks) as stream:
            stream.finish()

    for found in on_ranks(3, load):
        assert isinstance(found, RankError)
        assert found.rank is None
        assert "about to load different things: ranks 0 and 1 differ in" in str(found)
        assert named in str(found)


def test_a_rank_that_is_somewhere_else_is_no_deadlock(mixed: Checkpoint) -> None:
    def load(ranks: Ranks, rank: int) -> None:
        if rank:
            return
        with open_stream(requests(mixed), OPTIONS, ranks=ranks) as stream:
            stream.finish()

    for found in on_ranks(2, load):
        assert isinstance(found, RankError)
        assert "do not load the same (they are at 'its plan of load 1', 'the end')" in str(found)


def test_pieces_of_different_sizes_are_never_gathered(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the plans have agreed, and something else not."""
    monkeypatch.setattr("pyint8.streaming.ranks.transport.fingerprint", lambda *_, **__: {})

    def load(ranks: Ranks, rank: int) -> None:
        options = replace(OPTIONS, host_scratch=(rank + 1) << 20)
        with open_stream(requests(mixed, in_bands=True), options, ranks=ranks) as stream:
            for name in mixed:
                list(stream.bands(name))
            stream.finish()

    for found in on_ranks(2, load):
        assert isinstance(found, RankError)
        assert "about to gather different things" in str(found)


def test_ctrl_c_while_others_are_waited_for(mixed: Checkpoint) -> None:
    """Of the main thread's waits: here a thread stands for it."""
    entered = threading.Event()

    def load(ranks: Ranks, rank: int) -> None:
        if rank:
            entered.wait()
            raise KeyboardInterrupt
        entered.set()
        with open_stream(requests(mixed), OPTIONS, ranks=ranks) as stream:
            stream.finish()

    found = on_ranks(2, load)
    assert isinstance(found[1], KeyboardInterrupt)
    assert str(found[0]) == "rank 1 of 2 failed: KeyboardInterrupt"
