"""Which modules become `Linear8bitLt`, and putting them there on meta (and back)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pyint8.config import Int8Config
from pyint8.host.imports import imported
from pyint8.quantizer.backend import bitsandbytes
from pyint8.quantizer.reads import find_reads

_UNCALLED = "its weight is used without calling the module"


def conv1d_class() -> type[nn.Module] | None:
    """transformers' Conv1D; None if transformers is not imported, when no module can be one."""
    return getattr(imported("transformers.pytorch_utils"), "Conv1D", None)


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether modules of this class store their weight as [in, out]."""
    conv1d = conv1d_class()
    return conv1d is not None and issubclass(kind, conv1d)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it became a `Linear8bitLt`, as far as that is known; else its class."""
    found = getattr(module, "source_cls", None)
    return found if isinstance(found, type) else type(module)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear of some kind, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(type(module))


def why_not_linear(module: nn.Module) -> str | None:
    """None for a module that computes x @ W.T + b and nothing else; otherwise the reason."""
    if type(module) is nn.Linear or is_conv1d(type(module)):
        return None
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):  # of nn.MultiheadAttention
        return _UNCALLED
    if isinstance(module, nn.Linear):
        return None if _is_linear_in_disguise(module) else f"{type(module).__name__} computes more than a Linear does"
    return "not a Linear"


def _used_by_fast_paths(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Linears in torch's own encoder layers, whose fast path in evaluation mode reads their weights directly."""
    layers = [module for module in modules if isinstance(module, nn.TransformerEncoderLayer)]
    return [linear for layer in layers for linear in (layer.linear1, layer.linear2)]


def _is_linear_in_disguise(module: nn.Linear) -> bool:
    """Whether a subclass of Linear (Falcon's, for instance) computes what Linear does: tried on random numbers."""
    state = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if not state <= {"weight", "bias"} or any(True for _ in module.buffers()) or any(True for _ in module.children()):
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:  # models are built with meta and fp16 as defaults
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    probe = copy.copy(module)
    probe.in_features, probe.out_features = 5, 3
    weight, bias, inputs = draw(3, 5), draw(3), draw(2, 5)
    probe._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if module.bias is None else nn.Parameter(bias, requires_grad=False),
    }
    expected = nn.functional.linear(inputs, weight, probe._parameters["bias"])
    try:
        with torch.no_grad(), torch.device("cpu"):
            result = probe(inputs)
    except Exception:  # it cannot be called as a Linear is
        return False
    return isinstance(result, torch.Tensor) and result.shape == expected.shape and torch.allclose(result, expected)


def tied_names(model: nn.Module) -> list[set[str]]:
    """The names of each parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [group for group in names.values() if len(group) > 1]


def modules_to_keep(model: nn.Module) -> list[str]:
    """Modules best left unquantized: those whose weights are tied, and the last one, the output head."""
    last = list(dict(model.named_parameters()))[-1:]
    keep = set().union(last, *tied_names(model))
    return sorted(name.rpartition(".")[0] for name in keep)


def choose_modules(model: nn.Module, wanted: Callable[[str], bool]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear modules to convert, by name, and the reasons why the others are not."""
    linear = {name: module for name, module in model.named_modules() if is_linear(module) and name != ""}
    skipped = {name: "in the list of modules to skip" for name in linear if not wanted(name)}
    reasons = {name: why_not_linear(module) for name, module in linear.items() if name not in skipped}
    skipped |= {name: reason for name, reason in reasons.items() if reason is not None}
    return {name: module for name, module in linear.items() if name not in skipped}, skipped


def why_read(
    model: nn.Module, chosen: Mapping[str, nn.Module], facts: Mapping[str, Any], *, training: bool
) -> dict[str, str]:
    """The chosen modules whose weight is read without calling them: by name, a reason that names the reader.

    Args:
        model: Nothing in it is replaced yet.
        chosen: Modules that are to become int8.
        facts: Attributes that modules or their configurations will have once the model is loaded.
        training: Whether code that runs in training mode only counts too.
    """
    modules = dict(model.named_modules())
    readers = dict.fromkeys(_used_by_fast_paths(modules.values()), "nn.TransformerEncoderLayer.forward")
    readers |= find_reads(modules, chosen.values(), facts, training=training)
    return {name: f"{_UNCALLED} ({readers[module]})" for name, module in chosen.items() if module in readers}


def replace_with_int8(
    model: nn.Module, chosen: Mapping[str, nn.Module], config: Int8Config, *, pre_quantized: bool
) -> None:
    """Replaces every chosen module by a `Linear8bitLt` on meta."""
    modules = dict(model.named_modules())
    templates: dict[tuple[Any, ...], nn.Module] = {}  # docs/performance.md, "Building int8 modules"
    for name, module in chosen.items():
        assert isinstance(module.weight, torch.Tensor)
        kind = (type(module), module.weight.shape, module.bias is not None, module.training)
        if kind not in templates:
            templates[kind] = _int8_module(module, config, pre_quantized)
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, _copy(templates[kind]))


def _int8_module(module: nn.Module, config: Int8Config, pre_quantized: bool) -> nn.Module:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    out_features, in_features = reversed(weight.shape) if is_conv1d(type(module)) else weight.shape
    int8 = bitsandbytes.nn.Linear8bitLt(
        in_features,
        out_features,
        module.bias is not None,
        has_fp16_weights=config.has_fp16_weight,
        threshold=config.threshold,
        device="meta",
    )
    if pre_quantized:
        int8.weight.data = int8.weight.data.to(torch.int8)
    int8.source_cls = type(module)
    int8.requires_grad_(False)
    int8.train(module.training)
    return int8  # type: ignore[no-any-return]


def _copy(module: Any) -> nn.Module:
    """A copy of a `Linear8bitLt` on meta that shares no mutable state with it."""
    other: Any = copy.copy(module)
    own = {name: value.copy() for name, value in vars(module).items() if isinstance(value, (dict, set))}
    vars(other).update(own, state=copy.copy(module.state))
    weight, bias = module.weight, module.bias
    other._parameters["weight"] = bitsandbytes.nn.Int8Params(
        weight.data, requires_grad=False, has_fp16_weights=weight.has_fp16_weights
    )
    if bias is not None:
        other._parameters["bias"] = nn.Parameter(bias.data, requires_grad=False)
    return other  # type: ignore[no-any-return]
