"""A plain module with everything in it, checkpoints of it, and what bitsandbytes alone makes of it."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyint8 import Int8Config

ALL = Int8Config(skip_modules=[])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = Conv1D(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.attn(self.norm(x)))


class Net(nn.Module):
    """Nested, with Linear and Conv1D, a buffer, and a head."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.register_buffer("shift", torch.linspace(0, 1, 32))
        self.register_buffer("calls", torch.tensor(7))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


INT8 = [f"blocks.{number}.{leaf}" for number in range(2) for leaf in ("attn", "mlp.0", "mlp.2")]
IDS = torch.arange(12).reshape(2, 6)


def drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def saved(tmp_path: Path, module: nn.Module, *without: str) -> Path:
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items() if name not in without}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def on_meta(**kwargs: Any) -> Net:
    with torch.device("meta"):
        return Net(**kwargs).eval()


def by_hand(module: nn.Module, names: list[str], dtype: torch.dtype = torch.float16) -> nn.Module:
    """What bitsandbytes makes of a module on the CPU: the reference."""
    module.to(dtype)
    for name in names:
        old = module.get_submodule(name)
        weight = old.weight.data.T.contiguous() if isinstance(old, Conv1D) else old.weight.data
        new = bnb.nn.Linear8bitLt(
            weight.shape[1], weight.shape[0], old.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        new.bias = old.bias
        module.set_submodule(name, new)
    return module.eval()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == reference.keys()
    for name, tensor in reference.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    for name, parameter in theirs.named_parameters():
        assert type(ours.get_parameter(name)) is type(parameter)
        assert ours.get_parameter(name).stride() == parameter.stride()
