"""Buffers that a class computes in `__init__` alone are lost in transformers' from_pretrained, and that is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from zoo import ZOO

import pyint8
from pyint8 import Int8Config

VALUES = torch.arange(16.0) + 1


class Config(PretrainedConfig):
    model_type = "buffered"


class Scaling(nn.Module):
    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.register_buffer("scale", VALUES.clone(), persistent=persistent)

    def compute_scale(self) -> None:
        self.scale = torch.arange(16.0) + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x * self.scale.to(x.dtype))


class Lost(PreTrainedModel):
    """Computes it in `__init__` only."""

    config_class = Config
    persistent = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([Scaling(self.persistent) for _ in range(2)])
        self.head = nn.Linear(16, 4, bias=False)
        self.post_init()


class Written(Lost):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Scaling):
            init.copy_(module.scale, VALUES)


class Assigned(Lost):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Scaling):
            module.scale = torch.arange(16.0) + 1


class Computed(Lost):
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Scaling):
            module.compute_scale()


class Saved(Lost):
    persistent = True


class Nested(PreTrainedModel):
    """Its inner model writes the buffer."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.inner = Assigned(config)
        self.head = nn.Linear(16, 4, bias=False)
        self.post_init()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "lost in transformers'" in record.getMessage()]


def stored(cls: type[PreTrainedModel], tmp_path: Path) -> Path:
    cls(Config()).save_pretrained(tmp_path)
    return tmp_path


def test_it_is_told_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pyint8.load(stored(Lost, tmp_path), "cpu", model=Lost)
    (text,) = told(caplog)
    assert text.startswith("layers.0.scale, layers.1.scale of this Lost: computed in __init__, not in the checkpoint")
    assert "_init_weights" in text
    assert "persistent=True" in text


def test_the_drop_in_and_a_takeover_tell_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = stored(Lost, tmp_path)
    Lost.from_pretrained(folder, quantization_config=Int8Config())
    with pyint8.takeover():
        Lost.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert len(told(caplog)) == 2


@pytest.mark.parametrize("cls", [Written, Assigned, Computed, Saved, Nested])
def test_what_is_written_or_saved_is_not_told(
    cls: type[PreTrainedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = pyint8.load(stored(cls, tmp_path), "cpu", model=cls, dtype=torch.float32)
    layers = model.inner.layers if cls is Nested else model.layers
    assert all(torch.equal(layer.scale, VALUES) for layer in layers)
    assert not told(caplog)


@pytest.mark.parametrize("name", ["llama", "bert_mlm", "qwen2_vl", "whisper", "t5", "llava", "gemma", "falcon"])
def test_models_that_compute_theirs_again_are_quiet(
    name: str, load: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    load(name, model=ZOO[name].cls)
    assert not told(caplog)


def test_a_module_of_ones_own_keeps_its_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = pyint8.load(stored(Lost, tmp_path) / "model.safetensors", "cpu", model=Filled(), dtype=torch.float16)
    assert all(torch.equal(layer.scale, VALUES) for layer in module.layers)
    assert not told(caplog)


class Filled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scaling(False) for _ in range(2)])
        self.head = nn.Linear(16, 4, bias=False)


def test_what_was_moved_is_not_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """accelerate moves buffers, of which it cannot be said afterwards what was written to them."""
    pyint8.load(
        stored(Written, tmp_path / "model"),
        {"layers.0": "cpu", "layers.1": "disk", "head": "cpu"},
        model=Written,
        config=Int8Config(fp32_cpu_offload=True),
        offload_folder=tmp_path / "off",
    )
    assert not told(caplog)
