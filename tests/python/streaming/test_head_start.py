"""Tensors that land before there is a stream: it takes them over, and nothing is read twice."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import CPU, MIB, bytes_of, head_start, over, requests, stored, unstamped, write

from pyint8.checkpoint import Checkpoint
from pyint8.errors import RankError, ReadError, TruncatedError
from pyint8.streaming import head_start as head_start_module
from pyint8.streaming.guesses import Guessed
from pyint8.streaming.head_start import FirstTensors, _has_room
from pyint8.streaming.lane import Lane
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import ReadRequest, Transport

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(params=[1, 64], ids=["one before the others", "all at once"])
def every_size_is_worthwhile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    monkeypatch.setattr("pyint8.streaming.head_start._FIRST_ASKED", request.param)


@pytest.mark.usefixtures("every_size_is_worthwhile")
@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("nbytes", [0, 60, 1_000_000, 10_000_000])
def test_what_was_begun_early_is_taken_over(mixed: Checkpoint, nbytes: int, in_bands: bool) -> None:
    start = head_start(list(mixed.values()), nbytes)
    transport, early, _ = start.take()
    with over(requests(mixed, in_bands=in_bands), transport, early) as stream:
        for name, entry in mixed.items():
            bands = [(row, bytes_of(band), len(band) if band.ndim else 1) for row, band in stream.bands(name)]
            assert b"".join(raw for _, raw, _ in bands) == stored(entry)
            assert [row for row, _, _ in bands] == [sum(rows for _, _, rows in bands[:i]) for i in range(len(bands))]
        assert transport.stats()["bytes_delivered"] == mixed.nbytes  # nothing was read twice


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_early_tensors_are_bands_of_no_more_than_the_scratch_has(mixed: Checkpoint) -> None:
    start = head_start([mixed["large"]])
    with over([TensorRequest(mixed["large"], CPU, in_bands=True)], *start.take()[:2]) as stream:
        sizes = [band.nbytes for _, band in stream.bands("large")]
    assert max(sizes) <= MIB // 8
    assert sum(sizes) == mixed["large"].nbytes


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_an_early_tensor_had_whole_is_the_memory_it_landed_in(mixed: Checkpoint) -> None:
    start = head_start([mixed["large"]])
    with over([TensorRequest(mixed["large"], CPU, in_bands=True)], *start.take()[:2]) as stream:
        tensor = stream.whole("large")
    assert bytes_of(tensor) == stored(mixed["large"])
    assert tensor.untyped_storage().nbytes() == mixed["large"].nbytes


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_what_was_begun_early_and_is_not_wanted_is_dropped(mixed: Checkpoint) -> None:
    start = head_start(list(mixed.values()))
    with over([TensorRequest(mixed["last"], CPU)], *start.take()[:2]) as stream:
        assert bytes_of(stream.whole("last")) == stored(mixed["last"])


def test_small_tensors_are_not_begun_early(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x.safetensors", {"small": ("U8", (MIB - 1,)), "large": ("U8", (MIB,))})
    start = head_start(list(checkpoint.values()))
    transport, early, _ = start.take()
    assert set(early) == {"large"}
    transport.close()


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_head_start_asks_for_a_few_and_for_all_others(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it would let go of the interpreter's lock, and the thread that builds the model would keep it."""
    asked: list[int] = []
    submit = Transport.submit

    def counted(self: Transport, lane: Any, reads: list[Any], **more: Any) -> int:
        asked.append(len(reads))
        return submit(self, lane, reads, **more)

    monkeypatch.setattr(Transport, "submit", counted)
    start = head_start(list(mixed.values()))
    transport, early, _ = start.take()
    transport.close()
    few = head_start_module._FIRST_ASKED
    assert asked == ([few, len(early) - few] if few == 1 else [len(early)])
    assert len(early) > 2


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_head_start_that_nobody_takes(mixed: Checkpoint) -> None:
    head_start(list(mixed.values())).close()


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_head_start_that_fails_fails_when_it_is_taken(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x.safetensors", {"x": ("U8", (100,))})
    (tmp_path / "x.safetensors").unlink()
    start = head_start(list(checkpoint.values()))
    with pytest.raises(ReadError, match="cannot open the file"):
        start.take()


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_memory_that_is_read_into_outlives_an_error(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head start that nobody takes: until the engine is closed."""
    memory: list[weakref.ref[Any]] = []
    lives: list[bool] = []
    close = Transport.close

    def failing(self: Transport, lane: Lane, reads: list[ReadRequest], *, is_agreed: bool) -> None:
        assert not is_agreed
        self.submit(lane, reads)
        memory.extend(weakref.ref(read.memory) for read in reads)
        raise RankError("one failed meanwhile")

    def closing(self: Transport) -> None:
        lives.extend(each() is not None for each in memory)
        close(self)

    monkeypatch.setattr(Transport, "submit_early", failing)
    monkeypatch.setattr(Transport, "close", closing)
    start = head_start(list(mixed.values()))
    start._join()  # closed at once, it may not have begun
    start.close()
    assert lives == [True] * len(memory)
    assert memory


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_file_cut_while_it_is_begun_early_names_the_tensor(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x.safetensors", {"x": ("U8", (100,)), "y": ("U8", (100_000,))})
    os.truncate(checkpoint["y"].path, checkpoint["y"].offset + 10)
    entries = unstamped(checkpoint)
    start = head_start(list(entries.values()))
    with over(requests(entries), *start.take()[:2]) as stream, pytest.raises(TruncatedError) as caught:
        list(map(stream.whole, checkpoint))
    assert caught.value.tensor == "y"


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_so_does_what_nobody_wants(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x.safetensors", {"x": ("U8", (100,)), "y": ("U8", (100_000,))})
    os.truncate(checkpoint["y"].path, checkpoint["y"].offset + 10)
    entries = unstamped(checkpoint)
    transport, early, _ = head_start(list(entries.values())).take()
    with pytest.raises(TruncatedError) as caught:
        TensorStream([TensorRequest(entries["x"], CPU)], transport, early=early)
    transport.close()
    assert caught.value.tensor == "y"


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_head_start_ends_where_the_device_is_full(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is left to the load, which may need less at a time."""
    given: list[int] = []
    make = torch.UntypedStorage

    def limited(nbytes: int, **where: Any) -> torch.UntypedStorage:
        if len(given) == 2:
            raise torch.OutOfMemoryError
        given.append(nbytes)
        return make(nbytes, **where)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "UntypedStorage", limited)
        transport, early, _ = head_start(list(mixed.values())).take()
    assert list(early) == list(mixed)[:2]
    with over(requests(mixed), transport, early) as stream:
        assert all(bytes_of(stream.whole(name)) == stored(entry) for name, entry in mixed.items())


@pytest.mark.parametrize(
    ("free", "held", "gives", "has_room", "asked"),
    [
        (120, 0, True, True, [60]),
        (99, 0, True, False, []),
        (80, 20, True, True, [60]),
        (80, 30, True, True, []),  # half of it is held from an earlier load
        (120, 0, False, False, [60]),
    ],
)
@pytest.mark.parametrize("scratch", [0, 50])
def test_a_head_start_needs_room(
    free: int, held: int, gives: bool, has_room: bool, asked: list[int], scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And scratch beside it for what is guessed, which is taken before a map is planned."""
    allocated: list[int] = []

    def empty(size: int, **_: Any) -> None:
        allocated.append(size)
        if not gives:
            raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "memory_reserved", lambda _: 1000 + held)
        patch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (free + scratch, 1 << 30))
        patch.setattr(torch, "empty", empty)
        gpu = torch.device("cuda")
        guess = (lambda: Guessed([], None)) if scratch else None
        part = FirstTensors(gpu, reserved=60, if_free=100, guess=guess)
        assert _has_room(part, Lane(gpu, 0, 0, scratch_bytes=50)) is has_room
    assert allocated == asked
