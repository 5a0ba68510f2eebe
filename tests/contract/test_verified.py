"""`pyint8.verify` of checkpoints that are sound: nothing is found, with a source and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reloads import CPU
from safetensors.torch import load_file, save_file
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import CheckpointNotFoundError, OptionError, Pyint8Error


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("zoo_model", ZOO.values(), ids=list(ZOO))
def test_every_architecture(zoo_model: ZooModel, kind: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = checkpoints.folder(zoo_model, kind)
    pyint8.convert(source, tmp_path / "int8", device="cpu", max_shard_size="60KB")
    result = pyint8.verify(tmp_path / "int8", against=source, device="cpu")
    assert result.is_sound, result.findings
    stored = open_checkpoint(tmp_path / "int8")
    assert result.tensors == len(stored) == result.compared + len(result.not_compared)
    assert (result.nbytes, result.files) == (stored.nbytes, stored.files)
    assert result.int8_weights == sum(name.endswith("SCB") for name in stored)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", PREQUANTIZED])
@pytest.mark.parametrize("name", ["llama_sharded", "gpt2", "mixtral", "t5"])
def test_without_a_source(name: str, kind: str, checkpoints: CheckpointStore) -> None:
    result = pyint8.verify(checkpoints.folder(ZOO[name], kind))
    assert result.is_sound
    assert bool(result.int8_weights) == (kind == PREQUANTIZED)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"config": pyint8.Int8Config(skip_modules=["k_proj", "lm_head"])},
        {"config": pyint8.Int8Config(skip_modules=[])},
    ],
    ids=repr,
)
def test_how_it_was_made_is_in_its_configuration(options: Any, source: Path, tmp_path: Path) -> None:
    pyint8.convert(source, tmp_path / "int8", device="cpu", **options)
    assert pyint8.verify(tmp_path / "int8", against=source, device="cpu").is_sound
    pyint8.save(pyint8.load(source, CPU, **options), tmp_path / "saved")
    assert pyint8.verify(tmp_path / "saved", against=source, device="cpu").is_sound


def test_files_of_other_kinds(source: Path, int8: Path, tmp_path: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert pyint8.verify(tmp_path / "pytorch_model.bin").is_sound
    assert pyint8.verify(int8 / "model.safetensors").is_sound
    odd = {
        "a": torch.tensor(3),
        "b": torch.zeros(0, 4),
        "c": torch.tensor([True]),
        "d": torch.zeros(2).to(torch.float8_e5m2),
    }
    save_file(odd, tmp_path / "odd.safetensors")
    assert pyint8.verify(tmp_path / "odd.safetensors").tensors == 4
    views = {"t": torch.arange(12.0).reshape(3, 4).T, "u": torch.arange(9)[::2]}
    torch.save(views, tmp_path / "views.bin")
    assert pyint8.verify(tmp_path / "views.bin").is_sound


def test_the_result_is_data(int8: Path, source: Path) -> None:
    result = pyint8.verify(int8, against=source, device="cpu")
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["is_sound"] is True
    assert plain["findings"] == plain["not_compared"] == []
    assert plain["against"] == str(source)
    assert plain["compared"] == plain["tensors"] == result.tensors


@pytest.mark.usefixtures("nothing_left")
def test_nothing_is_left(int8: Path, source: Path) -> None:
    pyint8.verify(int8, against=source, device="cpu")


def test_wrong_calls(int8: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        pyint8.verify(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        pyint8.verify(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="against is for int8 checkpoints"):
        pyint8.verify(source, against=source)
    with pytest.raises(OptionError, match="which is int8 itself"):
        pyint8.verify(int8, against=int8)
    with pytest.raises(OptionError, match="device is"):
        pyint8.verify(int8, against=source, device="nowhere")
    for nothing in (tmp_path, tmp_path / "nowhere", "no hub id"):
        with pytest.raises(Pyint8Error):
            pyint8.verify(int8, against=nothing)
    with pytest.raises(CheckpointNotFoundError):
        pyint8.verify("someone/nothing")
