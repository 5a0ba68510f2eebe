"""`pyint8.reload`: the bytes of a fresh load, in the memory that the model has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import state
from reloads import CPU, addresses, forward, logits, spoil
from safetensors.torch import load_file
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel

import pyint8
from pyint8.models import replacing


@pytest.mark.parametrize("kind", ["bf16", "fp32", PREQUANTIZED])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("zoo_model", ZOO.values(), ids=list(ZOO))
def test_every_architecture(zoo_model: ZooModel, kind: str, used: bool, checkpoints: CheckpointStore) -> None:
    source = checkpoints.folder(zoo_model, kind)
    model, expected = (pyint8.load(source, CPU, model=zoo_model.cls) for _ in range(2))
    lacking = zoo_model.name == "bert_fresh_head"
    if used and not lacking:
        forward(zoo_model, model)
        forward(zoo_model, expected)  # which casts biases
    spoil(model)
    before, spoiled = addresses(model), state(model)
    pyint8.reload(model, source, strict=not lacking)
    found, wanted = state(model), state(expected)
    if lacking:
        kept = {name for name in found if name.startswith(("classifier", "bert.pooler"))}
        wanted |= {name: spoiled[name] for name in kept}
    assert found == wanted
    assert addresses(model) == before


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_the_dtype_is_the_model_s(name: str, dtype: torch.dtype, kind: str, checkpoints: CheckpointStore) -> None:
    model = pyint8.load(checkpoints.folder(ZOO[name], "bf16"), CPU, dtype=dtype)
    spoil(model)
    pyint8.reload(model, checkpoints.folder(ZOO[name], kind))
    assert state(model) == state(pyint8.load(checkpoints.folder(ZOO[name], kind), CPU, dtype=dtype))


def test_the_dtype_may_be_a_name(old: Path, checkpoints: CheckpointStore) -> None:
    source = checkpoints.folder(ZOO["llama"], "fp32")
    model = pyint8.load(old, CPU)
    model.config.dtype = "bfloat16"
    pyint8.reload(model, source)
    assert state(model) == state(pyint8.load(source, CPU, dtype=torch.bfloat16))


def test_16_bit_and_int8_by_turns(old: Path, new: Path, tmp_path: Path) -> None:
    model = pyint8.load(old, CPU)
    pyint8.convert(new, tmp_path / "int8", device="cpu")
    expected = {path: state(pyint8.load(path, CPU)) for path in (old, new)}
    for path, wanted in ((tmp_path / "int8", new), (old, old), (tmp_path / "int8", new), (new, new)):
        report = pyint8.reload(model, path)
        assert state(model) == expected[wanted]
        assert report.tensors["pre-quantized" if path == tmp_path / "int8" else "int8"] == 14


def test_transformers_own_models(old: Path, new: Path, peer: Callable[..., Any]) -> None:
    model = peer("llama")
    logits(model)
    pyint8.reload(model, new)
    assert state(model) == state(pyint8.load(new, CPU, dtype=torch.float16))


def test_what_is_skipped_stays_16_bit(old: Path, new: Path) -> None:
    config = pyint8.Int8Config(skip_modules=["k_proj", "lm_head", r".*\.1\.mlp\.up_proj"])
    model = pyint8.load(old, CPU, config=config)
    pyint8.reload(model, new)
    assert state(model) == state(pyint8.load(new, CPU, config=config))


def test_a_head_that_became_int8_too(old: Path, new: Path) -> None:
    config = pyint8.Int8Config(skip_modules=[])
    model = pyint8.load(old, CPU, config=config)
    pyint8.reload(model, new)
    assert state(model) == state(pyint8.load(new, CPU, config=config))


def test_pickled_checkpoints(old: Path, new: Path, tmp_path: Path) -> None:
    shutil.copy(new / "config.json", tmp_path)
    torch.save(load_file(new / "model.safetensors"), tmp_path / "pytorch_model.bin")
    model = pyint8.load(old, CPU)
    pyint8.reload(model, tmp_path)
    assert state(model) == state(pyint8.load(new, CPU))


def test_a_base_model_takes_its_part(old: Path, new: Path) -> None:
    model = pyint8.load(old, CPU, model=transformers.LlamaModel)
    pyint8.reload(model, new)
    assert state(model) == state(pyint8.load(new, CPU, model=transformers.LlamaModel))


@pytest.mark.parametrize("nbytes", [0, 20_000])
def test_few_tensors_are_made_at_a_time(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    model, most = pyint8.load(old, CPU), 0
    write = replacing.Replacement._write

    def counted(self: replacing.Replacement, maker: Any) -> None:
        nonlocal most
        most = max(most, self._nbytes)
        write(self, maker)

    monkeypatch.setattr(replacing, "_CHECKED_BYTES", nbytes)
    monkeypatch.setattr(replacing.Replacement, "_write", counted)
    pyint8.reload(model, new)
    assert state(model) == state(pyint8.load(new, CPU))
    assert most <= nbytes + max(parameter.nbytes for parameter in model.parameters())
