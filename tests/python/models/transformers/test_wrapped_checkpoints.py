"""Checkpoints of which nothing, or not enough, fits the model: never a model of random weights without a word."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import CheckpointError
from pyint8.models.checks import wrapper_prefix

Copy = Callable[..., Path]


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {change(name): value for name, value in load_file(path).items()}
    save_file({name: value for name, value in tensors.items() if name is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_mlm"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "a.b."])
def test_a_wrappers_prefix_is_named(name: str, prefix: str, copy_of: Copy) -> None:
    folder = copy_of(name)
    rename(folder, lambda tensor: prefix + tensor)
    with pytest.raises(CheckpointError, match=f"names begin with '{prefix}'.*strip the prefix") as caught:
        pyint8.load(folder, "cpu")
    assert caught.value.path == str(folder / "model.safetensors")


def test_what_peft_saved_of_a_wrapped_model_is_named(copy_of: Copy) -> None:
    folder = copy_of("llama")
    rename(folder, lambda tensor: "base_model.model." + tensor.replace("q_proj.", "q_proj.base_layer."))
    with pytest.raises(CheckpointError, match=r"names begin with 'base_model\.model\.'"):
        pyint8.load(folder, "cpu")


def test_another_models_checkpoint(checkpoints: CheckpointStore, copy_of: Copy) -> None:
    folder = copy_of("llama")
    other = checkpoints.folder(ZOO["bert_mlm"], "fp16") / "model.safetensors"
    (folder / "model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match="is it the checkpoint of this model"):
        pyint8.load(folder, "cpu")


def test_lenient_loads_warn_as_transformers_does(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of("llama")
    rename(folder, lambda tensor: "module." + tensor)
    pyint8.load(folder, "cpu", strict=False)
    assert "14 linear modules are not in the checkpoint" in caplog.text


def test_layers_that_are_not_stored_are_counted(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of("llama")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 4
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "pyint8"):
        model, report = pyint8.load(folder, "cpu", return_report=True)
    said = [record.getMessage() for record in caplog.records if "linear modules" in record.getMessage()]
    assert said[0].startswith("14 linear modules are not in the checkpoint")
    assert "model.layers.2.self_attn.q_proj" in said[0]
    assert " and 9 more; train before use" in said[0]
    assert len([name for name in report.skipped if name.startswith(("model.layers.2", "model.layers.3"))]) == 14
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.int8


def test_a_head_alone_is_no_body(copy_of: Copy) -> None:
    folder = copy_of("llama")
    rename(folder, lambda tensor: tensor if tensor.startswith("lm_head") else "x." + tensor)
    with pytest.raises(CheckpointError, match=r"names begin with 'x\.'"):
        pyint8.load(folder, "cpu")


def test_a_fresh_head_is_no_reason(checkpoints: CheckpointStore) -> None:
    import transformers as tf

    model = pyint8.load(
        checkpoints.folder(ZOO["llama"], "fp16"), "cpu", model=tf.AutoModelForSequenceClassification, num_labels=3
    )
    assert type(model.score) is nn.Linear


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_module_of_ones_own(prefix: str, tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    save_file({prefix + name: value for name, value in net().state_dict().items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"names begin with '{prefix}'.*strip the prefix"):
        pyint8.load(tmp_path / "x.safetensors", "cpu", model=net())


def test_a_module_of_ones_own_without_any_weight_to_quantize(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    save_file({"1.weight": torch.ones(8), "0.wait": torch.ones(8, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is it the checkpoint of this model"):
        pyint8.load(tmp_path / "x.safetensors", "cpu", model=net)
    assert type(net[0]) is nn.Linear


def test_a_module_of_ones_own_that_has_none(tmp_path: Path) -> None:
    save_file({"0.wait": torch.ones(8)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is it the checkpoint of this model"):
        pyint8.load(tmp_path / "x.safetensors", "cpu", model=nn.Sequential(nn.LayerNorm(8)))


class SavesItself(nn.Sequential):
    def save_pretrained(self, folder: Any) -> None:
        """As diffusers' models have it."""


@pytest.mark.parametrize(("kind", "warned"), [(SavesItself, True), (nn.Sequential, False)])
def test_a_module_that_its_library_saves_is_warned_of(
    kind: type[nn.Sequential], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = kind(nn.Linear(8, 8), nn.Linear(8, 2))
    save_file(module.state_dict(), tmp_path / "x.safetensors")
    filled = pyint8.load(tmp_path / "x.safetensors", "cpu", model=module)
    assert ("has a save_pretrained of its own" in caplog.text) is warned
    save_file(filled.state_dict(), tmp_path / "y.safetensors")  # the advice
    again = pyint8.load(tmp_path / "y.safetensors", "cpu", model=kind(nn.Linear(8, 8), nn.Linear(8, 2)))
    assert torch.equal(again[0].weight, filled[0].weight)


def test_the_prefix_most_names_have() -> None:
    own = {"a.weight", "a.bias", "b.weight"}
    assert wrapper_prefix(["m.a.weight", "m.a.bias", "n.b.weight"], own) == "m."
    assert wrapper_prefix(["x.y.b.weight"], own) == "x.y."
    assert wrapper_prefix(["a.weight", "c"], own) is None
    assert wrapper_prefix([], own) is None
