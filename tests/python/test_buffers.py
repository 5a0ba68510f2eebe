"""Buffers that a class computes in its constructor and does not save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from zoo import ZOO, CheckpointStore

import pyint8


class Config(tf.PretrainedConfig):
    model_type = "with_buffers"


class Computed(tf.PreTrainedModel):
    """`scale` is computed in the constructor alone."""

    config_class = Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.head = nn.Linear(16, 4, bias=False)
        self.register_buffer("scale", torch.arange(16).float() + 1, persistent=False)
        self.register_buffer("kept", torch.arange(16).float(), persistent=True)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x * self.scale.to(x.dtype)))  # type: ignore[no-any-return]


class Copied(Computed):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            tf.initialization.copy_(self.scale, torch.arange(16).float() + 1)


class Replaced(Computed):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.scale = torch.arange(16).float() + 1


@pytest.mark.parametrize(("kind", "warned"), [(Computed, True), (Copied, False), (Replaced, False)])
@pytest.mark.parametrize("way", ["load", "config"])
def test_those_that_nothing_sets_are_named(
    kind: type, warned: bool, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind(Config()).save_pretrained(tmp_path)
    if way == "load":
        model = pyint8.load(tmp_path, "cpu", model=kind)
    else:
        model = kind.from_pretrained(tmp_path, quantization_config=pyint8.Int8Config())  # type: ignore[attr-defined]
    said = [record.getMessage() for record in caplog.records if "never got their values" in record.getMessage()]
    assert [text.split(" never")[0] for text in said] == ([f"{kind.__name__}: scale"] if warned else [])
    if not warned:
        assert torch.equal(model.scale.float(), torch.arange(16).float() + 1)
    assert torch.equal(model.kept.float(), torch.arange(16).float())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_transformers_own_models_set_theirs(
    name: str, checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", model=ZOO[name].cls)
    assert "never got their values" not in caplog.text
