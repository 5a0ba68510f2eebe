"""Experts in int8 beside the same weights in fp32: results, gradients, and every class of transformers' interface."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.models
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from pyint8.quantizer.experts import linear
from pyint8.quantizer.experts.forward import is_usual
from pyint8.quantizer.experts.linear import experts_linear
from pyint8.quantizer.experts.modules import Int8Experts, make_int8, why_not_experts
from pyint8.quantizer.experts.names import SCALES, WEIGHTS


def random_experts(experts: int, out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the weights they stand for."""
    generator = torch.Generator().manual_seed(experts * out + inner)
    codes = torch.randint(-127, 128, (experts, out, inner), dtype=torch.int8, generator=generator)
    scales = torch.rand(experts, out, generator=generator) + 0.5
    return codes, scales, codes.float() * scales.unsqueeze(-1) / 127


def ends_of(ids: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.searchsorted(ids, torch.arange(experts), right=True, out_int32=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_each_row_meets_its_expert(rows: int, dtype: torch.dtype) -> None:
    codes, scales, weights = random_experts(5, 24, 70)
    ids = torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(1)).sort().values
    x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = experts_linear(x, codes, scales, ends_of(ids, 5))
    expected = torch.einsum("ri,roi->ro", x.float(), weights[ids])
    assert y.dtype == dtype
    assert torch.allclose(y.float(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)


@pytest.mark.parametrize("operator", [experts_linear, linear.experts_linear_backward, linear.experts_forward], ids=str)
def test_triton_launches_where_the_rows_are(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [torch.device("cuda", 0)], []

    @contextmanager
    def device(other: torch.device) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    def launch(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        launched.append((x.device, current[-1]))
        return x

    kernels = SimpleNamespace(linear=launch, linear_backward=launch, forward=launch)
    monkeypatch.setattr(linear, "_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():  # there may be no GPU
        rows = torch.empty(4, 8, device="cuda:1")
    operator._backend_fns["cuda"](rows, rows, rows, rows)
    assert launched == [(rows.device, rows.device)]
    assert len(current) == 1


def test_rows_of_no_expert_are_zero() -> None:
    codes, scales, _ = random_experts(3, 8, 16)
    y = experts_linear(torch.ones(6, 16), codes, scales, torch.tensor([2, 2, 4], dtype=torch.int32))
    assert y[:4].abs().min() > 0
    assert torch.equal(y[4:], torch.zeros(2, 8))


def test_gradients() -> None:
    codes, scales, weights = random_experts(4, 12, 20)
    ids = torch.tensor([0, 0, 2, 3, 3])
    x = torch.randn(5, 20, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    experts_linear(x, codes, scales, ends_of(ids, 4)).square().sum().backward()
    torch.einsum("ri,roi->ro", other, weights[ids]).square().sum().backward()
    assert torch.allclose(x.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_operators_are_sound() -> None:
    codes, scales, _ = random_experts(2, 6, 8)
    arguments = (torch.randn(3, 8, requires_grad=True), codes, scales, torch.tensor([1, 3], dtype=torch.int32))
    torch.library.opcheck(torch.ops.pyint8.experts_linear, arguments)


# --- modules ----------------------------------------------------------------------------------------------------------


def experts_classes() -> Iterator[type[nn.Module]]:
    """Every class of transformers that takes part in its experts interface."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
        except ImportError:
            continue
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "_apply_gate"):
                yield value


CLASSES = list(experts_classes())


def test_there_are_many() -> None:
    assert len(CLASSES) > 50


def int8_of(module: Any) -> tuple[Any, Any]:
    """The module in int8, and with the weights that its codes stand for; both of random values."""
    ours, theirs = copy.deepcopy(module).to("meta"), module
    make_int8(ours)
    for name in WEIGHTS:
        weight = theirs._parameters.get(name)
        if weight is None:
            continue
        codes, scales, values = random_experts(*ours._parameters[name].shape)
        values = values * 0.05
        ours._parameters[name] = nn.Parameter(codes, requires_grad=False)
        ours._buffers[name + SCALES] = scales * 0.05
        weight.data = (values.transpose(1, 2) if ours.was_transposed else values).contiguous()
    others = {name: value for name, value in theirs.state_dict().items() if name not in WEIGHTS}
    ours.load_state_dict(others, strict=False, assign=True)
    return ours, theirs


class TinyConfig:
    """Of any model: small sizes by what a field's name says."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        lower = name.lower()
        if lower.startswith("__"):
            raise AttributeError(name)
        if "latent" in lower:
            return None
        if "act" in lower and "expert" not in lower:
            return "silu"
        if any(word in lower for word in ("limit", "alpha", "softcap")):
            return 7.0
        if "expert" in lower:
            return 4
        if "bias" in lower:
            return False
        return 1e-5 if "eps" in lower else 32 if lower.endswith(("hidden_size", "hidden_dim", "d_model")) else 24


def tiny(kind: type[nn.Module]) -> Any:
    module: Any = kind(TinyConfig()).float()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.requires_grad_(False)


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, 4, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(tokens, 2, generator=generator)
    return torch.randn(tokens, 32, generator=generator), index, weights


INTERFACE = [kind for kind in CLASSES if why_not_experts(tiny(kind)) is None]


def test_what_has_a_way_of_its_own_is_told() -> None:
    assert set(INTERFACE) == set(CLASSES)
    other = LongcatFlashExperts(TinyConfig())
    assert why_not_experts(other) == "LongcatFlashExperts computes with its experts in a way of its own"
    assert why_not_experts(nn.Linear(2, 2)) == ""


@pytest.mark.parametrize("kind", INTERFACE, ids=lambda kind: kind.__name__)
def test_every_class_computes_what_its_weights_say(kind: type[nn.Module]) -> None:
    ours, theirs = int8_of(tiny(kind))
    assert isinstance(ours, kind)
    assert isinstance(ours, Int8Experts)
    for tokens in (0, 1, 9):
        assert torch.allclose(ours(*routed(tokens)), theirs(*routed(tokens)), rtol=1e-3, atol=1e-4)


def test_most_are_one_operator() -> None:
    """Which the kernels are made for; others go step by step."""
    assert sum(is_usual(int8_of(tiny(kind))[0]) for kind in INTERFACE) >= 45


def test_experts_of_another_rank_add_nothing() -> None:
    kind = next(kind for kind in INTERFACE if is_usual(int8_of(tiny(kind))[0]))
    ours, _ = int8_of(tiny(kind))
    x, index, weights = routed(9)
    expected = ours(x, index, weights.masked_fill(index == 3, 0.0))
    ours._is_expert_parallel = True
    elsewhere = torch.where(index == 3, 4, index)
    assert torch.allclose(ours(x, elsewhere, weights), expected)
    with_gradients = ours(x.requires_grad_(), elsewhere, weights)  # step by step
    assert torch.allclose(with_gradients, expected, atol=1e-5)


# --- Llama 4 ----------------------------------------------------------------------------------------------------------


def weighted(tokens: int) -> torch.Tensor:
    """All tokens for all four experts, weighted: two of them by 0."""
    x, index, weights = routed(tokens)
    scores = torch.zeros(tokens, 4).scatter_(1, index, weights)
    return (scores.T.unsqueeze(-1) * x).reshape(-1, 32)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Sigmoid()], ids=["silu", "sigmoid"])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_every_token_for_every_expert(tokens: int, activation: nn.Module) -> None:
    ours, theirs = int8_of(tiny(Llama4TextExperts))
    ours.act_fn = theirs.act_fn = activation
    inputs = [weighted(tokens).requires_grad_() for _ in range(2)]
    found, expected = ours(inputs[0]), theirs(inputs[1])
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    for result in (found, expected):
        result.square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)


def test_rows_of_no_weight_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = int8_of(tiny(Llama4TextExperts))
    ends: list[torch.Tensor] = []

    def linear(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        ends.append(end)
        return experts_linear(x, codes, scales, end)

    monkeypatch.setattr("pyint8.quantizer.experts.forward.experts_linear", linear)
    ours(weighted(9))
    assert [int(end[-1]) for end in ends] == [18, 18]  # of 36


def test_values_that_are_not_finite_spread() -> None:
    ours, theirs = int8_of(tiny(Llama4TextExperts))
    x = weighted(3)
    x[4, 5] = torch.nan
    assert torch.equal(ours(x).isnan(), theirs(x).isnan())


def test_llama_4_is_copied_and_compiled() -> None:
    ours, _ = int8_of(tiny(Llama4TextExperts))
    expected = ours(weighted(5))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(weighted(5)), expected)
    assert torch.allclose(torch.compile(ours, fullgraph=True, backend="aot_eager")(weighted(5)), expected)


# --- what modules do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INTERFACE[:2], ids=lambda kind: kind.__name__)
def test_copies_and_pickles(kind: type[nn.Module]) -> None:
    ours, _ = int8_of(tiny(kind))
    expected = ours(*routed(5))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert torch.equal(other(*routed(5)), expected)


def test_scales_stay_in_fp32() -> None:
    ours, _ = int8_of(tiny(INTERFACE[0]))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.half().to(torch.bfloat16)
    assert {name: value.dtype for name, value in ours.state_dict().items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_routing_weights_and_activations_have_gradients() -> None:
    ours, theirs = int8_of(tiny(INTERFACE[0]))
    found = []
    for module in (ours, theirs):
        x, index, weights = routed(6)
        module(x.requires_grad_(), index, weights.requires_grad_()).square().sum().backward()
        found.append((x.grad, weights.grad))
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-4)


def test_compiled_in_one_piece() -> None:
    ours, _ = int8_of(tiny(INTERFACE[0]))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*routed(6)), ours(*routed(6)))
