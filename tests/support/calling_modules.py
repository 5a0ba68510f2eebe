"""Modules that call all of their layers, and look at a weight in ways that do no harm."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from reading_modules import Base
from torch import nn
from torch.nn import functional as F  # noqa: N812

Tensor = torch.Tensor


class GuardOfT5(Base):
    def forward(self, x: Tensor) -> Tensor:
        if (
            isinstance(self.a.weight, torch.Tensor)
            and x.dtype != self.a.weight.dtype
            and self.a.weight.dtype != torch.int8
        ):
            x = x.to(self.a.weight.dtype)
        return self.a(x)


class GuardOfNllb(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.a.weight.dtype and (
            self.a.weight.dtype != torch.int8 and self.a.weight.dtype != torch.uint8
        ):
            x = x.to(self.a.weight.dtype)
        return self.a(x)


class GuardOfGemma(Base):
    def forward(self, x: Tensor) -> Tensor:
        if (target_dtype := self.a.weight.dtype).is_floating_point:
            x = x.to(target_dtype)
        return self.a(x)


class GuardOfTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.to(self.a.weight.dtype) if self.a.weight.is_floating_point() else x)


class GuardAmongOthers(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight.dtype not in (torch.int8, torch.uint8):
            return self.a(x.to(self.a.weight.dtype))
        return self.a(x)


class ReturnsEarly(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight.dtype == torch.int8:
            return self.a(x)
        return F.linear(x, self.a.weight)


class Compared(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight.dtype == torch.float32:
            x = x.float()
        assert self.a.weight is not None, f"{self.a.weight.dtype}"
        return self.a(x)


class Placed(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.a.weight.device)
        ones = torch.ones(self.a.weight.shape[0], device=self.a.weight.device)
        return self.a(x) + ones[: self.a.weight.size(0)]


class NotConfigured(Base):
    """LLaMA's code of old, which many checkpoints bring."""

    def forward(self, x: Tensor) -> Tensor:
        if self.config.tp > 1 and self.config.slow:
            return F.linear(x, self.a.weight)
        if getattr(self.config, "pretraining_tp", 1) > 1:
            return F.linear(x, self.b.weight)
        return self.a(x)


class Quantized(Base):
    """As Falcon-Mamba asks."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.config, "_is_quantized"):
            return self.a(x)
        return F.linear(x, self.a.weight)


class InTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.requires_grad:
            return F.linear(x, self.a.weight)
        return self.a(x)


class ForInt8(Base):
    """As RWKV does."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            if hasattr(layer.weight, "SCB"):
                layer.weight.SCB.div_(2)
            else:
                layer.weight.div_(2)
        return self.a(self.b(x))


class Made(Base):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.a.weight)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.a.weight = self.b.weight

    def _init_weights(self, module: nn.Module) -> None:
        module.weight.data.normal_()
        self.a.weight.data.mul_(2)

    def reset_parameters(self) -> None:
        self.a.weight.data.fill_(1)

    def resize_outputs(self, count: int) -> None:
        self.a = nn.Linear(8, count, device=self.a.weight.device, dtype=self.a.weight.dtype)

    def freeze(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad = False


class HasAnUnusedHelper(Base):
    """As Qwen2-VL's vision tower has one."""

    def get_dtype(self) -> torch.dtype:
        return self.a.weight.dtype


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) * self.weight


class WithNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.embed = Norm(), nn.Embedding(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.norm.weight.dtype) + self.embed.weight[0]
        return self.a(self.norm(x))


class Spelled(nn.Linear):
    """Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class WithSpelled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a = Spelled(8, 8)
        self.config = SimpleNamespace(tp=1)
