"""`pyint8.convert`: what a conversion that was interrupted may be gone on with by."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from checksums import add_checksums, damage
from failing import failing
from safetensors.torch import load_file, save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import ChecksumError, NonFiniteWeightError, ReadError, WriteError
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_staging(path: Any = ".") -> bool:
    return str(path).endswith(".saving-resumed")


def test_no_journal_is_among_the_files_where_the_folder_cannot_be_looked_into(source: Path, tmp_path: Path) -> None:
    pyint8.convert(source, tmp_path / "expected", device="cpu")
    before = sorted(os.listdir(tmp_path))
    with mock.patch.object(os, "listdir", failing("listdir", 3, names_staging)), pytest.raises(WriteError):
        pyint8.convert(source, tmp_path / "int8", device="cpu")  # looked into before the work, after it, and at its end
    assert sorted(os.listdir(tmp_path)) == before
    pyint8.convert(source, tmp_path / "int8", device="cpu")
    assert contents(tmp_path / "int8") == contents(tmp_path / "expected")


def test_what_is_done_outlives_a_disk_that_fails_when_it_is_looked_for(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "int8", 40)
    with mock.patch.object(os, "listdir", failing("listdir", 1, names_staging)), pytest.raises(ReadError):
        pyint8.convert(source, tmp_path / "int8", device="cpu")
    report = pyint8.convert(source, tmp_path / "int8", device="cpu")
    assert 0 < report.checkpoint_bytes < sum(value.nbytes for value in load_file(source / "model.safetensors").values())
