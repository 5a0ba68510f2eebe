"""The possible values of an expression in a module's code, as far as the model at hand determines them.

A value is a tuple of alternatives: objects of the model (modules, numbers of its configuration, functions), `ANYTHING`,
or one of the stand-ins below for what the code would see of a weight if it were int8.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyint8.quantizer.reads.functions import is_set_later


class _Anything:
    """An unknown alternative."""


ANYTHING = _Anything()
Value = tuple[Any, ...]
UNKNOWN: Value = (ANYTHING,)


@dataclass(frozen=True)
class Weight:
    """The weight of a module that is to become int8."""

    module: nn.Module


@dataclass(frozen=True)
class WeightDtype:
    """Its dtype."""

    module: nn.Module


@dataclass(frozen=True)
class Parameters:
    """The result of `module.parameters()`."""

    module: nn.Module


@dataclass(frozen=True)
class Method:
    """A function bound to the object it was found on."""

    owner: Any
    function: Any


@dataclass(frozen=True)
class Property:
    """A method that is called when it is looked up."""

    owner: Any
    function: Any


@dataclass(frozen=True)
class Super:
    """The result of `super()`: the methods of `owner` that come after those of `cls`."""

    owner: Any
    cls: type


@dataclass(frozen=True)
class Returns:
    """Something that returns this, however it is called."""

    value: Value


@dataclass(frozen=True)
class Many:
    """A sequence, each item with its alternatives."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class NamePattern:
    """A string of which parts are known: a regular expression."""

    pattern: str


@dataclass(frozen=True)
class Lookup:
    """An attribute that is yet to be looked up."""

    owner: Any
    name: str


STAND_INS = (_Anything, Weight, WeightDtype, Parameters, Method, Property, Super, Returns, Many, NamePattern, Lookup)
# Attributes of a weight that reveal neither its values nor its dtype.
_OF_ANY_TENSOR = (
    *("device", "get_device", "is_cuda", "is_cpu", "is_meta", "requires_grad", "requires_grad_", "is_leaf", "grad"),
    *("shape", "size", "ndim", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "layout"),
    *("nbytes", "element_size", "data_ptr", "storage", "untyped_storage", "__class__"),
)
_SAME_WEIGHT = ("data", "T", "mT")
_OF_INT8_WEIGHTS = ("CB", "SCB", "has_fp16_weights")
_PLAIN = (bool, int, float, str, type(None), tuple, list, dict, torch.dtype, ModuleType, type)


def merged(*values: Value) -> Value:
    """The alternatives of all of them."""
    found: list[Any] = []
    for one in itertools.chain(*values):
        if not any(one is other for other in found):
            found.append(one)
    return tuple(found)


def holds_module(value: Value) -> bool:
    """Whether a module may be among its alternatives."""
    return any(
        isinstance(one, nn.Module) or (isinstance(one, Many) and any(map(holds_module, one.items))) for one in value
    )


def bound(arguments: ast.arguments, given: Sequence[Value], keywords: Mapping[str, Value]) -> dict[str, Value]:
    """Values of a function's parameters; unknown where they were not given, as callers may pass anything."""
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names = dict.fromkeys([*positional, *(argument.arg for argument in arguments.kwonlyargs)], UNKNOWN)
    names |= {name: _hashable(value) for name, value in zip(positional, given, strict=False)}
    return names | {name: _hashable(value) for name, value in keywords.items() if name in names}


def _hashable(value: Value) -> Value:
    try:
        hash(value)
    except TypeError:
        return UNKNOWN
    return value


class Model:
    """The objects that code can reach from a module.

    Args:
        candidates: The modules that are to become int8.
        facts: Attributes that modules or their configurations will have once the model is loaded.
        training: Whether it may be in training mode; else `self.training` is False.
    """

    def __init__(self, candidates: Iterable[nn.Module], facts: Mapping[str, Any], *, training: bool) -> None:
        self._candidates = {id(module) for module in candidates}
        self._facts = facts
        self._training = training

    def is_candidate(self, value: Any) -> bool:
        return id(value) in self._candidates

    def attribute(self, owner: Any, name: str) -> Value | None:
        """What `owner.name` may be; None if `owner` is a weight and the attribute reveals its values or dtype."""
        if isinstance(owner, Weight):
            return _of_weight(owner, name)
        if isinstance(owner, WeightDtype):
            return (getattr(torch.int8, name, ANYTHING),)
        if isinstance(owner, Super):
            return _of_super(owner, name)
        if isinstance(owner, nn.Module):
            return self._of_module(owner, name)
        return (self._facts[name],) if name in self._facts else _of_object(owner, name)

    def has(self, owner: Any, name: str) -> bool | None:
        """Whether `owner` will have such an attribute; None where that is not known."""
        if isinstance(owner, Weight):
            return name in _OF_INT8_WEIGHTS or hasattr(torch.Tensor, name)
        if isinstance(owner, STAND_INS):
            return None
        if name in self._facts or inspect.getattr_static(owner, name, ANYTHING) is not ANYTHING:
            return True
        if isinstance(owner, nn.Module):  # a missing one may be set later
            return True if any(name in vars(owner)[kind] for kind in ("_modules", "_parameters", "_buffers")) else None
        return False

    def first_parameter(self, module: nn.Module) -> Value:
        """The result of `next(module.parameters())`."""
        for name, _ in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            return self._of_module(module.get_submodule(owner), leaf)
        return UNKNOWN

    def _of_module(self, module: nn.Module, name: str) -> Value:
        if name == "weight" and self.is_candidate(module):
            return (Weight(module),)
        if name == "training":
            return UNKNOWN if self._training else (False,)
        if name in self._facts:
            return (self._facts[name],)
        own = vars(module)
        for registry in ("_parameters", "_buffers"):
            if name in own[registry]:
                return (None,) if own[registry][name] is None else UNKNOWN
        if name in own["_modules"]:
            return (own["_modules"][name],)
        cls: type = type(module)
        if is_set_later(cls, name):
            return UNKNOWN
        return (own[name],) if name in own else _bound(inspect.getattr_static(cls, name, ANYTHING), module)


def _of_weight(weight: Weight, name: str) -> Value | None:
    if name == "dtype":
        return (WeightDtype(weight.module),)
    if name in _SAME_WEIGHT:
        return (weight,)
    if name in ("is_floating_point", "is_complex"):
        return (Returns((False,)),)
    return UNKNOWN if name in (*_OF_ANY_TENSOR, *_OF_INT8_WEIGHTS) else None


def _of_super(owner: Super, name: str) -> Value:
    mro = type(owner.owner).__mro__
    after = mro[mro.index(owner.cls) + 1 :] if owner.cls in mro else ()
    return next((_bound(vars(cls)[name], owner.owner) for cls in after if name in vars(cls)), UNKNOWN)


def _bound(attribute: Any, owner: Any) -> Value:
    """A class's attribute, as its instance returns it."""
    if isinstance(attribute, staticmethod):
        return (attribute.__func__,)
    if inspect.isfunction(attribute):
        return (Method(owner, attribute),)
    if isinstance(attribute, property) or inspect.getattr_static(attribute, "func", None) is not None:  # a cached one
        return (Property(owner, attribute),)
    return (attribute,) if isinstance(attribute, _PLAIN) else UNKNOWN


def _of_object(owner: Any, name: str) -> Value:
    """Of an object that is no module: looked up without running code, except for a configuration's aliases."""
    if isinstance(owner, STAND_INS):
        return UNKNOWN
    if hasattr(type(owner), "attribute_map"):
        return (getattr(owner, name, ANYTHING),)
    found = inspect.getattr_static(owner, name, ANYTHING)
    is_static = isinstance(owner, (ModuleType, type)) and (inspect.isroutine(found) or callable(found))
    return (found,) if is_static or isinstance(found, _PLAIN) else UNKNOWN
