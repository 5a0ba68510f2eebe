"""What the tests of `pyint8.reload` share: two checkpoints of one architecture, and how to look at a model's memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO, ZooModel

CPU = {"": "cpu"}
LLAMA = ZOO["llama"]


def saved(model: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint in one file, with its tensors changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def memory(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the state dict has of the model's memory, scales among it."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith("weight_format")}


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in memory(model).items()}


def spoil(model: nn.Module) -> None:
    """Writes ones over all that was loaded."""
    with torch.inference_mode():
        for tensor in memory(model).values():
            tensor.fill_(1)


def forward(zoo_model: ZooModel, model: Any) -> Any:
    with torch.no_grad():
        return model(**zoo_model.inputs(model))


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = forward(LLAMA, model).logits
    return found


def adapted(model: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **more)
    return get_peft_model(model, config).eval()
