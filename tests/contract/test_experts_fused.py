"""int8 experts that are saved as one tensor a layer, and that this is another form of the same, on every road."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from oracle import state
from safetensors.torch import load_file, save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import ModelNotSupportedError, OptionError
from pyint8.operations.cached import wait_for_fills

EXPERTS = pyint8.Int8Config(experts=True)
OPTIONS: dict[str, Any] = {"dtype": torch.bfloat16, "progress": False}


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def source(request: pytest.FixtureRequest, checkpoints: CheckpointStore) -> Path:
    return Path(checkpoints.folder(ZOO[request.param], "bf16"))


@pytest.fixture
def model(source: Path) -> Any:
    return pyint8.load(source, "cpu", config=EXPERTS, **OPTIONS)


@pytest.fixture
def fused(model: Any, tmp_path: Path) -> Path:
    pyint8.save(model, tmp_path / "fused", fused_experts=True)
    return tmp_path / "fused"


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_they_are_whole_in_the_file(model: Any, fused: Path) -> None:
    stored, layers = load_file(fused / "model.safetensors"), len(model.model.layers)
    codes = [value for value in stored.values() if value.dtype == torch.int8 and value.ndim == 3]
    scales = [value for key, value in stored.items() if key.endswith("_SCB")]
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        assert sum(torch.equal(getattr(experts, name), value) for value in codes) == 1
        assert sum(torch.equal(getattr(experts, f"{name}_SCB"), value) for value in scales) == 1
    assert len(codes) == len(scales) == 2 * layers
    assert not any(".experts.0." in key for key in stored)


def test_they_are_loaded_as_they_were(model: Any, fused: Path) -> None:
    assert state(pyint8.load(fused, "cpu", **OPTIONS)) == state(model)
    with pyint8.takeover():
        assert state(tf.AutoModelForCausalLM.from_pretrained(fused, device_map="cpu")) == state(model)
    for value in model.state_dict().values():
        value.zero_()
    pyint8.reload(model, fused, progress=False)
    assert state(pyint8.load(fused, "cpu", **OPTIONS)) == state(model)


def test_they_are_verified_and_inspected(source: Path, fused: Path) -> None:
    assert pyint8.verify(fused).findings == ()
    compared = pyint8.verify(fused, against=source, device="cpu")
    assert (compared.findings, compared.compared) == ((), compared.tensors)
    stored = load_file(fused / "model.safetensors")
    found = pyint8.inspect(fused)
    assert found.int8_nbytes == sum(value.nbytes for value in stored.values())
    assert "model.layers.0.mlp.experts" in found.int8
    codes = [value for value in stored.values() if value.dtype == torch.int8]
    assert found.int8_kinds["int8"] == sum(value.nbytes for value in codes)
    assert compared.int8_weights == len(codes)


def test_scales_that_are_not_finite_are_found(fused: Path) -> None:
    stored = load_file(fused / "model.safetensors")
    key = next(key for key in stored if key.endswith("down_proj_SCB"))
    stored[key][1, 2] = torch.inf
    save_file(stored, fused / "model.safetensors", {"format": "pt"})
    (found,) = pyint8.verify(fused).findings
    assert found.tensor == key
    assert f"NaN, infinite or negative, that of row {stored[key].shape[1] + 2} first" in found.problem


def test_convert_gives_the_same_from_any_form(source: Path, model: Any, fused: Path, tmp_path: Path) -> None:
    pyint8.save(model, tmp_path / "each")
    forms = {False: weights_of(tmp_path / "each"), True: weights_of(fused)}
    for wanted, expected in forms.items():
        for number, (path, config) in enumerate(((source, EXPERTS), (tmp_path / "each", None), (fused, None))):
            made = tmp_path / f"{wanted} {number}"
            pyint8.convert(path, made, device="cpu", config=config, fused_experts=wanted, **OPTIONS)
            assert weights_of(made) == expected


def test_what_was_whole_is_saved_as_the_others(model: Any, fused: Path, tmp_path: Path) -> None:
    again = pyint8.load(fused, "cpu", **OPTIONS)
    again.save_pretrained(tmp_path / "theirs")
    for name, each in (("first", model), ("second", again)):
        pyint8.save(each, tmp_path / name)
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "theirs")


def test_the_cache_has_them_whole(source: Path, model: Any, tmp_path: Path) -> None:
    def load() -> Any:
        return pyint8.load(source, "cpu", config=EXPERTS, cache=tmp_path / "cache", return_report=True, **OPTIONS)

    load()
    assert wait_for_fills(60)
    cached, report = load()
    assert report.from_cache
    assert state(cached) == state(model)
    (file,) = (tmp_path / "cache").rglob("model.safetensors")
    assert not any(".experts.0." in key for key in load_file(file))
    for name, each in (("first", model), ("second", cached)):
        pyint8.save(each, tmp_path / name)
    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "second")


def test_a_body_alone_and_a_model_around_it(source: Path, model: Any, tmp_path: Path) -> None:
    body = pyint8.load(source, "cpu", model=tf.AutoModel, config=EXPERTS, **OPTIONS)
    pyint8.save(body, tmp_path / "body", fused_experts=True)
    pyint8.save(model, tmp_path / "whole", fused_experts=True)
    assert state(pyint8.load(tmp_path / "whole", "cpu", model=tf.AutoModel, **OPTIONS)) == state(body)
    around = pyint8.load(tmp_path / "body", "cpu", model=tf.AutoModelForCausalLM, **OPTIONS)
    assert state(around.model) == state(body)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_another_form_is_refused(fused: Path) -> None:
    config = json.loads((fused / "config.json").read_text())
    assert config["experts_implementation"] == "pyint8-1"
    (fused / "config.json").write_text(json.dumps({**config, "experts_implementation": "pyint8-2"}))
    with pytest.raises(ModelNotSupportedError, match="are of the form pyint8-2, and this pyint8 reads pyint8-1"):
        pyint8.load(fused, "cpu")


def test_without_int8_experts_there_is_nothing_to_fuse(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = checkpoints.folder(ZOO["mixtral"], "bf16")
    with pytest.raises(OptionError, match="fused_experts is for int8 experts, and this MixtralForCausalLM has none"):
        pyint8.convert(source, tmp_path / "int8", device="cpu", fused_experts=True, progress=False)
    with pytest.raises(OptionError, match="fused_experts is for int8 experts"):
        pyint8.save(pyint8.load(source, "cpu"), tmp_path / "int8", fused_experts=True)
    with pytest.raises(OptionError, match="fused_experts is for transformers models"):
        pyint8.save(torch.nn.Linear(2, 2), tmp_path / "int8", fused_experts=True)
    assert not (tmp_path / "int8").exists()
