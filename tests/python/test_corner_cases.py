"""Ways of loading that are easily forgotten."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.utils as hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config
from pyint8.errors import ModelNotSupportedError, NonFiniteWeightError, OptionError


def damaged(source: Path, folder: Path, name: str, index: tuple[int, ...], value: float) -> Path:
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "leaf", "index", "config"),
    [
        (PREQUANTIZED, "SCB", (3,), None),
        ("bf16", "weight", (3, 1), Int8Config(has_fp16_weight=True)),
    ],
    ids=["scales", "has_fp16_weight"],
)
def test_infinity_is_told_however_the_weight_comes(
    checkpoints: CheckpointStore,
    tmp_path: Path,
    checkpoint: str,
    leaf: str,
    index: tuple[int, ...],
    config: Int8Config | None,
) -> None:
    source = Path(checkpoints.folder(ZOO["llama"], checkpoint))
    folder = damaged(source, tmp_path, f"model.layers.0.self_attn.q_proj.{leaf}", index, float("inf"))
    with pytest.raises(NonFiniteWeightError, match="row 3 has") as caught:
        pyint8.load(folder, "cpu", config=config)
    assert caught.value.tensor == "model.layers.0.self_attn.q_proj.weight"
    assert caught.value.path == str(folder / "model.safetensors")
    assert pyint8.load(folder, "cpu", config=config, strict=False) is not None


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)
        self.register_buffer("frequencies", torch.tensor([1e-5, 1e6]), persistent=False)


def test_buffers_of_the_modules_own_keep_their_dtype(tmp_path: Path) -> None:
    save_file(WithBuffer().state_dict(), tmp_path / "model.safetensors")
    module = pyint8.load(tmp_path, "cpu", model=WithBuffer(), dtype=torch.float16)
    assert torch.equal(module.frequencies, torch.tensor([1e-5, 1e6]))
    assert module.last.weight.dtype == torch.float16


def test_layers_are_put_back_when_a_weight_is_bad(tmp_path: Path) -> None:
    module = WithBuffer()
    state = module.state_dict()
    state["first.weight"] = torch.full((8, 8), float("nan"))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(NonFiniteWeightError):
        pyint8.load(tmp_path, "cpu", model=module)
    assert type(module.first) is nn.Linear


class OwnConfig(transformers.LlamaConfig):
    model_type = "llama-of-ones-own"


class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig


def test_a_class_brings_its_own_configuration(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    """No Auto class knows it, so the configuration's model_type says nothing."""
    built = ZOO["llama"].build()
    own = OwnModel(OwnConfig(**{k: v for k, v in built.config.to_dict().items() if k != "model_type"}))
    own.save_pretrained(tmp_path)
    model = pyint8.load(tmp_path, "cpu", model=OwnModel)
    assert type(model) is OwnModel
    with pytest.raises(ModelNotSupportedError, match="does not know the configuration"):
        pyint8.load(tmp_path, "cpu")


def test_hub_progress_bars_stay_as_they_were(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.enable_progress_bar()
    hub.disable_progress_bars()
    try:
        pyint8.load(folder, "cpu")
        assert hub.are_progress_bars_disabled()
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        hub.enable_progress_bars()
        if not shown:
            transformers.utils.logging.disable_progress_bar()


def test_mapping_files_is_not_an_option(checkpoints: CheckpointStore) -> None:
    with pytest.raises(OptionError, match="disable_mmap"):
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu", disable_mmap=True)


def test_an_int8_head_of_another_size_can_be_left_out(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "full")
    pyint8.load(tmp_path / "full", "cpu", config=Int8Config(skip_modules=[])).save_pretrained(tmp_path / "int8")
    assert "classifier.SCB" in load_file(tmp_path / "int8" / "model.safetensors")
    model = pyint8.load(tmp_path / "int8", "cpu", num_labels=5, ignore_mismatched_sizes=True)
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.shape == (5, 32)
    assert torch.isfinite(model(torch.arange(2, 12)[None]).logits).all()
