"""Modules that read the weight of `a` (and of `b`, in some) instead of calling it, in every way that occurs, and ones
that only seem to. Each has a Linear 8 -> 8 of these names, `bs`, a list of two, and `config`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

Tensor = torch.Tensor


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bs = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.config = SimpleNamespace(tp=1, slow=False)
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        return self.bs[1](self.bs[0](self.b(self.a(x))))


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.norm()


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


# --- modules that read ------------------------------------------------------------------------------------------------


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight, self.a.bias)


class Keyword(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.a.weight)


class Transposed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.a.weight.T)


class Operator(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.weight.data.t()


class Sliced(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a.weight[:, 0]


class CastThere(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.to(self.a.weight.dtype))


class CastLater(Base):
    def forward(self, x: Tensor) -> Tensor:
        target_dtype = self.a.weight.dtype
        return self.a(x.to(dtype=target_dtype))


class CastOnDifference(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.a.weight.dtype:
            x = x.to(self.a.weight.dtype)
        return self.a(x)


class CastToFirstParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.to(next(self.a.parameters()).dtype))


class CastByProperty(Base):
    @property
    def dtype(self) -> torch.dtype:
        return self.a.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.type(self.dtype))


class CastByCachedProperty(Base):
    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return self.a.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.type(self.dtype))


class Alias(Base):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.a
        weight = layer.weight
        return F.linear(x, weight)


class Unpacked(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.a.weight, self.b.bias
        return F.linear(x, weight, bias)


class Joined(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([layer.weight for layer in (self.a, self.b)])[::2])


class Listed(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights = [layer.weight for layer in self.bs]
        return F.linear(x, weights[1])


class Indexed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.bs[-1](x), self.bs[0].weight)


class Looped(Base):
    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.bs):
            x = F.linear(x, layer.weight) + number
        return x


class Zipped(Base):
    def forward(self, x: Tensor) -> Tensor:
        for scale, layer in zip((1, 2), self.bs, strict=True):
            x = scale * F.linear(x, layer.weight)
        return x


class OfTheRoundBefore(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = None
        for layer in self.bs:
            if weight is not None:
                x = F.linear(x, weight)
            weight = layer.weight
        return x


class OfChildren(Base):
    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            if name != "bs":
                x = F.linear(x, layer.weight)
        return x


class ByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, "a").weight)  # noqa: B009


class ByNameOfWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.get_submodule("a"), "weight"))  # noqa: B009


class ByPartOfName(Base):
    def __init__(self) -> None:
        super().__init__()
        self.rel_a, self.rel_b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for axis in "ab":
            x = F.linear(x, getattr(self, f"rel_{axis}").weight)
        return x


class Helped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return linear(self.b(x), self.a)


class HelpedWithWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(x, self.a.weight)


class ByMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self._project(x, layer=self.a)

    def _project(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight)


class ByStaticMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self._project(x, self.a)

    @staticmethod
    def _project(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight)


class ByMethodThatFinds(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._layer().weight)

    def _layer(self) -> nn.Linear:
        return self.a


class ByBase(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.b(x))


class Decorated(Base):
    @logged
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight)


class Inner(Base):
    def forward(self, x: Tensor) -> Tensor:
        def project(y: Tensor) -> Tensor:
            return F.linear(y, self.a.weight)

        return project(x)


class Lambda(Base):
    def forward(self, x: Tensor) -> Tensor:
        project = lambda y: F.linear(y, self.a.weight)  # noqa: E731
        return project(x)


class OnSomeInputs(Base):
    def forward(self, x: Tensor, fast: bool = False) -> Tensor:
        if fast or x.shape[0] > 100:
            return F.linear(x, self.a.weight)
        return self.a(x)


class OnceSet(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            return F.linear(x, self.a.weight)
        self.flag = True
        return self.a(x)


class AsConfigured(Base):
    def __init__(self) -> None:
        super().__init__()
        self.config.tp = 2

    def forward(self, x: Tensor) -> Tensor:
        if self.config.tp > 1:
            parts = self.a.weight.split(4, dim=0)
            return torch.cat([F.linear(x, part) for part in parts], -1)
        return self.a(x)


class NotOfForward(Base):
    def encode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight)


class Given(nn.Module):
    def forward(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight)


class Giving(Base):
    def __init__(self) -> None:
        super().__init__()
        self.given = Given()

    def forward(self, x: Tensor) -> Tensor:
        return self.given(x, self.a)


class Mapped(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layers["q"].weight)


class MappedLoop(Mapped):
    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.layers.items():  # noqa: PERF102
            x = F.linear(x, layer.weight)
        return x
