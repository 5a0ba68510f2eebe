"""Ranks compare what they are about to load while they read already: no load ends well where that differs."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from local_ranks import on_ranks
from pours import GPU, checkpoint_of, random_weight
from streams import CPU, requests

from pyint8 import RankError, StreamOptions, _core
from pyint8.checkpoint import Checkpoint
from pyint8.errors import Pyint8Error, TruncatedError
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.ranks import pieces
from pyint8.streaming.ranks.fingerprint import check_alike
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.ranks.transport import SharedTransport
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToDtype, ToInt8

__all__ = ["driver"]  # a fixture

OPTIONS = StreamOptions(threads=2, slot_bytes=8192, device_scratch=1 << 20, host_scratch=1 << 20)


@pytest.fixture(autouse=True)
def small_pieces_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 4096)


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
def test_a_load_that_needs_nothing_of_others_does_not_end_well_either(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(fingerprints: Any) -> None:
        time.sleep(0.3)
        check_alike(fingerprints)

    monkeypatch.setattr("pyint8.streaming.ranks.transport.check_alike", late)
    weights = {f"{number}": random_weight(10, 20, torch.bfloat16, number) for number in range(5)}
    entries = checkpoint_of(tmp_path, weights)
    ended_well = []

    def load(ranks: Ranks, rank: int) -> None:
        becomes = ToDtype(torch.float32) if rank else ToInt8(torch.bfloat16)
        asked = [TensorRequest(entry, GPU, becomes=becomes) for entry in entries.values()]
        with open_stream(asked, OPTIONS, opener=driver.lane, quantizer=driver.quantizer, ranks=ranks) as stream:
            for name in weights:
                stream.made(name)
            stream.finish()
            ended_well.append(rank)

    for found in on_ranks(2, load):
        assert isinstance(found, RankError)
        assert "ranks 0 and 1 differ in what becomes of them" in str(found)
    assert ended_well == []


def test_an_error_of_what_nobody_takes_comes_before_the_end(
    mixed: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing is left to be gathered once it has been met."""
    other, agree = tmp_path / "other.safetensors", SharedTransport.agree
    other.write_bytes(Path(mixed["large"].path).read_bytes())

    def cutting(self: SharedTransport, asked: list[TensorRequest], *arguments: Any) -> None:
        agree(self, asked, *arguments)
        if asked[0].entry.path == str(other):
            os.truncate(other, mixed["large"].offset + 1000)

    def load(ranks: Ranks, rank: int) -> None:
        conductor = ranks._conductor
        entries = [replace(entry, path=str(other), stamp=None) if rank else entry for entry in mixed.values()]
        with open_stream([TensorRequest(entry, CPU) for entry in entries], OPTIONS, ranks=ranks) as stream:
            with conductor._changed:
                assert rank == 0 or conductor._changed.wait_for(lambda: conductor._is_over, 30)
            stream.finish()
            assert rank == 0, "it ended well"

    monkeypatch.setattr(SharedTransport, "agree", cutting)
    first, second = on_ranks(2, load)
    assert isinstance(second, TruncatedError)
    assert second.tensor == "large"
    assert str(first).startswith("rank 1 of 2 failed: TruncatedError: ")


def test_no_load_begins_once_the_ranks_are_done(mixed: Checkpoint) -> None:
    """Whoever waited for what is to be gathered would wait for ever."""
    begun, first_have = [], threading.Barrier(2, timeout=30)

    def load(ranks: Ranks, rank: int) -> None:
        for number in range(3):  # the first may end before the other rank fails; then the second hears of it
            with suppress(Pyint8Error), open_stream(requests(mixed), OPTIONS, ranks=ranks) as stream:
                begun.append((rank, number))
                if number == 0:
                    first_have.wait()
                assert rank == 0, "of this rank"
                stream.finish()

    first, second = on_ranks(2, load)
    assert isinstance(second, AssertionError)
    assert isinstance(first, RankError)
    assert str(first).startswith("rank 1 of 2 failed: AssertionError: of this rank")
    assert (0, 2) not in begun


def test_a_file_that_ends_in_what_another_rank_has_no_room_for(
    mixed: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(mixed["large"].path).read_bytes()[: mixed["large"].offset + 1000])

    def load(ranks: Ranks, rank: int) -> None:
        entry = replace(mixed["large"], path=str(cut), stamp=None) if rank else mixed["large"]
        start = HeadStart([CPU], OPTIONS, ranks=ranks)
        start.begin([FirstTensors(CPU, [entry], (1 << 30) if rank else 0)])
        try:
            start.take().transport.close()
        finally:
            start.close()

    second = on_ranks(2, load)[1]
    assert isinstance(second, TruncatedError)
    assert second.tensor == "large"
