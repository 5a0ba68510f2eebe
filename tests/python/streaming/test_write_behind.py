"""Tensors are written behind the caller's back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from pyint8.streaming import write_behind
from pyint8.streaming.write_behind import WriteBehind


def test_all_bytes_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "_PIECE_BYTES", 10)
    tensors = [torch.randn(number, 3).T for number in range(20)]
    found: dict[int, bytes] = {}

    def write(number: int, pieces: Iterator[memoryview]) -> None:
        found[number] = b"".join(bytes(piece) for piece in pieces)

    with WriteBehind(3, 1000) as behind:
        for number, tensor in enumerate(tensors):
            behind.put(tensor, lambda pieces, number=number: write(number, pieces))  # type: ignore[misc]
        behind.finish()
    expected = {number: tensor.contiguous().numpy().tobytes() for number, tensor in enumerate(tensors)}
    assert found == expected


def test_no_more_waits_than_there_is_room_for() -> None:
    gate, begun = threading.Event(), threading.Event()

    def write(pieces: Iterator[memoryview]) -> None:
        begun.set()
        gate.wait(20)

    def fill(behind: WriteBehind) -> None:
        for _ in range(10):
            behind.put(torch.zeros(100, dtype=torch.uint8), write)

    with WriteBehind(2, 350) as behind:
        filler = threading.Thread(target=fill, args=(behind,))
        filler.start()
        assert begun.wait(20)
        filler.join(0.2)
        assert filler.is_alive()
        assert behind._bytes == 300
        gate.set()
        filler.join()
        behind.put(torch.zeros(1000, dtype=torch.uint8), write)  # alone, whatever it takes
        behind.finish()


def test_the_first_error_ends_it() -> None:
    def fail(_: Iterator[memoryview]) -> None:
        raise OSError("full")

    with WriteBehind(1, 100) as behind:
        failed = behind.put(torch.zeros(10, dtype=torch.uint8), fail)
        assert str(failed.exception()) == "full"
        behind._pool.submit(lambda: None).result()  # by now it is noted
        with pytest.raises(OSError, match="full"):
            behind.put(torch.zeros(60, dtype=torch.uint8), lambda pieces: None)
        with pytest.raises(OSError, match="full"):
            behind.finish()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pyint8 write")]
