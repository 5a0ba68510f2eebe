"""What the benchmark of the command line measures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pyint8.errors import OptionError
from pyint8.operations import bench as benching
from pyint8.operations.bench import Speed, bench

MIB = 1 << 20


def test_all_that_can_be_measured_here(tmp_path: Path) -> None:
    speeds = {speed.name: speed for speed in bench(tmp_path, "16MiB")}
    assert list(speeds) == ["disk", "bus", "page cache", "engine", "load"]
    for name in ("page cache", "engine", "load"):
        assert (speeds[name].gigabytes_per_second or 0) > 0.001
    assert "8 bf16 weights" in speeds["load"].note
    if not torch.cuda.is_available():
        assert speeds["bus"] == Speed("bus", None, "torch finds no GPU here")
    assert os.listdir(tmp_path) == []


def test_one_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    measuring = bench(tmp_path, 8 * MIB)
    next(measuring)
    assert os.listdir(tmp_path) != []
    measuring.close()
    assert os.listdir(tmp_path) == []


def test_files_that_stay_in_memory_have_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "takes_direct_reads", lambda _: False)
    monkeypatch.setattr(benching, "is_cached", lambda *_: True)
    assert next(iter(bench(tmp_path, 8 * MIB))).gigabytes_per_second is None


@pytest.mark.parametrize("size", [0, 3, "1MB", "900TB", "large", 1.5])
def test_sizes_that_cannot_be(size: object, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="size is"):
        next(bench(tmp_path, size))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="folder is"):
        next(bench(tmp_path / "absent"))


def test_the_weights_are_as_many_as_fit(tmp_path: Path) -> None:
    """Wide ones, as a model has, where there are enough of them."""
    few = benching._Weights(str(tmp_path), 15 * MIB)
    assert (few.width, few.count, few.nbytes) == (1024, 7, 14 * MIB)
    many = benching._Weights(str(tmp_path), 256 * MIB)
    assert (many.width, many.count) == (4096, 8)
    assert os.path.getsize(many.path) > 256 * MIB
