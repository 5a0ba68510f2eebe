"""Loads while torch has settings that should not affect them: a default dtype, autocast, inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import SERIALIZABLE, compare_models, peer_load, show
from safetensors.torch import save_file
from torch import nn
from torch_state import default_dtype
from transformers import BitsAndBytesConfig
from zoo import ZOO, CheckpointStore

import pyint8

AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu"),
    "autocast to fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference": torch.inference_mode,
    "device": lambda: torch.device("cpu"),
}


@pytest.fixture(params=AROUND)
def around(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[Any]]:
    return AROUND[request.param]


@pytest.mark.parametrize("has_fp16_weight", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_vl"])
def test_a_transformers_model(
    name: str, has_fp16_weight: bool, around: Callable[[], Any], checkpoints: CheckpointStore
) -> None:
    model = ZOO[name]
    folder = checkpoints.folder(model, "bf16")
    where: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float16}
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=has_fp16_weight)
    with around():
        theirs, _ = peer_load(folder, model.cls, quantization_config=quantization, **where)
        config = pyint8.Int8Config(has_fp16_weight=has_fp16_weight)
        ours = pyint8.load(folder, model=model.cls, config=config, **where)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE])
    assert not found, show(found)


def test_a_module_of_ones_own(around: Callable[[], Any], tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    path = tmp_path / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in network.state_dict().items()}, path)

    def load() -> dict[str, torch.Tensor]:
        module = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
        return pyint8.load(path, "cpu", model=module).state_dict()  # type: ignore[no-any-return]

    expected = load()
    with around():
        found = load()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype
        assert torch.equal(value, found[name])
