"""Checksums of tensors of which each rank reads a part: whoever read what is not right, all are told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checksums import add_checksums, damage
from fake_driver import FakeDriver, driver
from local_ranks import on_ranks
from safetensors.torch import save_file
from streams import over

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import ChecksumError, RankError
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.ranks import pieces
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToDtype, ToInt8

__all__ = ["driver"]  # a fixture

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Bands of 85 KiB, the last of which all ranks read whole, as they do the bias.
OPTIONS = StreamOptions(threads=2, slot_bytes=1 << 16, device_scratch=1 << 20, host_scratch=1 << 20)
SHAPES = {"first": (450, 300), "second": (450, 300), "bias": (9000,)}
WEIGHT_BYTES = 450 * 300 * 2
ROADS = {
    "to the CPU": (CPU, None),
    "int8": (GPU, ToInt8(torch.bfloat16)),
    "transposed": (GPU, ToInt8(torch.bfloat16, transposed=True)),
    "cast": (GPU, ToDtype(torch.float16)),
    "as stored": (GPU, ToDtype(torch.bfloat16)),
}

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


@pytest.fixture(autouse=True)
def small_pieces_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 40_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "checkpoint"
    found.mkdir()
    save_file({name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}, found / "model.safetensors")
    add_checksums(found)
    return found


def load(driver: FakeDriver, folders: list[Path], how: str, options: StreamOptions = OPTIONS) -> list[Any]:
    """The bytes that each rank made of its folder, or its error."""
    device, becomes = ROADS[how]

    def one(ranks: Ranks, rank: int) -> list[bytes]:
        entries = open_checkpoint(folders[rank] / "model.safetensors")
        weights = [TensorRequest(entries[name], device, True, None, becomes) for name in ("first", "second")]
        asked = [*weights, TensorRequest(entries["bias"], device)]
        with open_stream(asked, options, opener=driver.lane, quantizer=driver.quantizer, ranks=ranks) as stream:
            made = [stream.later(request.entry.name) for request in asked]
            stream.finish()
            driver.synchronize(0)
            return [each.contiguous().view(torch.uint8).numpy().tobytes() for each in made]

    return on_ranks(len(folders), one, lambda: driver.synchronize(0))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("how", ROADS)
def test_every_byte_counts_on_every_road(driver: FakeDriver, folder: Path, how: str, size: int) -> None:
    sound = load(driver, [folder] * size, how)
    assert sound == [sound[0]] * size
    entries = open_checkpoint(folder)
    positions = [("first", 0), ("first", 80_000), ("second", 86_990), ("second", WEIGHT_BYTES - 1), ("bias", 7)]
    for name, at in positions:
        damage(entries[name], at)
        for error in load(driver, [folder] * size, how):
            assert isinstance(error, ChecksumError), error
            assert (error.tensor, error.path, error.offset) == (name, entries[name].path, entries[name].offset)
            assert "have the CRC-32C" in str(error)
        damage(entries[name], at)
    assert load(driver, [folder] * size, how) == sound


def test_what_only_one_rank_has_read(driver: FakeDriver, folder: Path, tmp_path: Path) -> None:
    """Its own part is everybody's; what all read is its own; what others read of the same tensor is nobody's."""
    other = Path(shutil.copytree(folder, tmp_path / "of rank 1"))
    entries = open_checkpoint(other)
    sound = load(driver, [folder, other], "int8")
    for name, at, kinds in (
        ("first", 80_000, (ChecksumError, ChecksumError)),
        ("bias", 1, (RankError, ChecksumError)),
        ("second", 0, (list, list)),
    ):
        damage(entries[name], at)
        found = load(driver, [folder, other], "int8")
        assert tuple(map(type, found)) == kinds, found
        damage(entries[name], at)
    assert found == sound


def test_a_head_start_that_fits_on_one_rank_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What not all have memory for is summed up once, as it is read later."""
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)

    def load(ranks: Ranks, rank: int) -> list[str]:
        entries = open_checkpoint(folder / "model.safetensors")
        start = HeadStart([CPU], OPTIONS, ranks=ranks)
        start.begin([FirstTensors(CPU, [entries[name] for name in SHAPES], (rank + 1) * WEIGHT_BYTES)])
        transport, early, _ = start.take()
        begun = list(early)
        with over([TensorRequest(entries[name], CPU) for name in SHAPES], transport, early) as stream:
            for name in SHAPES:
                stream.whole(name)
            stream.finish()
        return begun

    assert on_ranks(2, load) == [["first"]] * 2
    damage(open_checkpoint(folder)["second"], 99)
    assert [type(error) for error in on_ranks(2, load)] == [ChecksumError] * 2


def test_ranks_without_them(driver: FakeDriver, folder: Path) -> None:
    sound = load(driver, [folder] * 2, "int8")
    damage(open_checkpoint(folder)["second"], 99)
    off = StreamOptions(threads=2, slot_bytes=1 << 16, device_scratch=1 << 20, checksums=False)
    found = load(driver, [folder] * 2, "int8", off)
    assert found[0] == found[1] != sound[0]
