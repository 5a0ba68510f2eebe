"""`pyint8.convert`: what a conversion that was interrupted may be gone on with by."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from checksums import add_checksums, damage
from safetensors.torch import load_file, save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import ChecksumError, NonFiniteWeightError
from pyint8.models import converted_files
from pyint8.streaming.write_behind import WriteBehind

NAME = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def source(checkpoints: CheckpointStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints.folder(ZOO["llama"], "bf16"), tmp_path / "source"))


def interrupted(source: Path, target: Path, after: int, **options: Any) -> None:
    """Converts so many tensors, and notes them."""
    put, written = WriteBehind.put, 0

    def put_some(behind: WriteBehind, *args: Any) -> Any:
        nonlocal written
        if written == after:
            raise KeyboardInterrupt
        written += 1
        future = put(behind, *args)
        future.result()
        return future

    with (
        mock.patch.object(WriteBehind, "put", put_some),
        mock.patch.object(converted_files, "_NOTED_BYTES", 1),
        pytest.raises(KeyboardInterrupt),
    ):
        pyint8.convert(source, target, device="cpu", **options)


def test_what_was_not_strict_is_not_gone_on_with_strictly(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[NAME][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    interrupted(source, tmp_path / "int8", 40, config=pyint8.Int8Config(strict=False))
    with pytest.raises(NonFiniteWeightError) as raised:
        pyint8.convert(source, tmp_path / "int8", device="cpu")
    assert raised.value.tensor == NAME
    assert not (tmp_path / "int8").exists()


def test_nor_what_was_not_compared_by_one_that_compares(source: Path, tmp_path: Path) -> None:
    damage(add_checksums(source)[NAME], 5)
    interrupted(source, tmp_path / "int8", 40, options=pyint8.StreamOptions(checksums=False))
    with pytest.raises(ChecksumError) as raised:
        pyint8.convert(source, tmp_path / "int8", device="cpu")
    assert raised.value.tensor == NAME
    assert not (tmp_path / "int8").exists()


def test_the_same_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    add_checksums(source)
    interrupted(source, tmp_path / "int8", 40)
    report = pyint8.convert(source, tmp_path / "int8", device="cpu")
    assert 0 < report.checkpoint_bytes < sum(value.nbytes for value in load_file(source / "model.safetensors").values())
