"""What Python and torch themselves do with values: truth, comparisons, items, built-in functions."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from pyint8.quantizer.reads.functions import is_opaque
from pyint8.quantizer.reads.values import (
    ANYTHING,
    STAND_INS,
    UNKNOWN,
    Lookup,
    Many,
    Method,
    Model,
    NamePattern,
    Parameters,
    Returns,
    Value,
    Weight,
    WeightDtype,
    merged,
)

_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, items: one in items,
    ast.NotIn: lambda one, items: one not in items,
}
# Functions that use nothing of a weight but its type or identity.
_ASK = (len, type, id, print, range, repr, str, callable, torch.is_tensor)


# --- Truth ------------------------------------------------------------------------------------------------------------


def truth(value: Value) -> bool | None:
    """Whether it counts as true; None where that is not known."""
    found = {_truth(one) for one in value}
    return found.pop() if len(found) == 1 else None


def _truth(one: Any) -> bool | None:
    if isinstance(one, STAND_INS):
        return True if isinstance(one, (WeightDtype, Method)) else None
    try:
        return bool(one)
    except Exception:  # an object's own __bool__
        return None


def compared(left: Value, operation: ast.cmpop, right: Value) -> Value:
    """The result of a comparison; a weight's dtype compares as int8."""
    found = {_compared(one, operation, other) for one in left for other in right}
    return tuple(found) if len(found) == 1 else UNKNOWN


def _compared(left: Any, operation: ast.cmpop, right: Any) -> Any:
    try:
        return bool(_COMPARISONS[type(operation)](_plain(left), _plain(right)))
    except Exception:  # they are not comparable, or one is unknown
        return ANYTHING


def _plain(one: Any) -> Any:
    """The operand as it is compared: itself, but for a weight's dtype and for sequences."""
    if isinstance(one, WeightDtype):
        return torch.int8
    if isinstance(one, Many):
        return tuple(_plain(item) for (item,) in one.items)
    if isinstance(one, STAND_INS) and not isinstance(one, Weight):
        raise ValueError(one)
    return one


# --- Items ------------------------------------------------------------------------------------------------------------


def _parts(container: Any) -> list[Value] | dict[Any, Value] | None:
    """The items of a sequence or mapping; None if it is neither, or unknown."""
    if isinstance(container, Many):
        return list(container.items)
    if isinstance(container, (nn.ModuleList, nn.Sequential)):
        return [(module,) for module in container._modules.values()]
    if isinstance(container, (list, tuple)):
        return [(one,) for one in container]
    if isinstance(container, nn.ModuleDict):
        container = container._modules
    return {key: (one,) for key, one in container.items()} if isinstance(container, dict) else None


def items(container: Any) -> Value:
    """The possible items when iterating over it."""
    parts = _parts(container)
    return UNKNOWN if parts is None else tuple(parts) if isinstance(parts, dict) else merged(*parts)


def item(container: Any, at: Value, *, sliced: bool) -> Value:
    """The possible values of `container[at]`, or of a slice."""
    parts = _parts(container)
    if parts is None:
        return (container,) if isinstance(container, Weight) else UNKNOWN
    every = list(parts.values()) if isinstance(parts, dict) else parts
    if sliced:
        return (Many(tuple(every)),)
    if len(at) != 1 or at[0] is ANYTHING:
        return merged(*every)
    try:
        return parts[at[0]]
    except (LookupError, TypeError):  # of a comprehension, one item stands for all
        return merged(*every) if isinstance(container, Many) else UNKNOWN


def unpacked(whole: Any, number: int, count: int) -> Value:
    """The item with this number of `count` that `whole` is unpacked into."""
    parts = _parts(whole)
    if isinstance(parts, list) and len(parts) == count:
        return parts[number]
    return (whole,) if isinstance(whole, Weight) else items(whole)


# --- Functions --------------------------------------------------------------------------------------------------------


def result(model: Model, function: Any, arguments: Sequence[Value]) -> Value | None:
    """The result of a function of Python or torch; None for those not known here."""
    if isinstance(function, Returns):
        return function.value
    if isinstance(function, Method):
        is_torchs = isinstance(function.owner, nn.Module) and is_opaque(function.function)
        return _of_torch(function.owner, function.function.__name__, arguments) if is_torchs else None
    if not isinstance(function, (BuiltinFunctionType, type, FunctionType)):
        return None
    if function in _ASK:
        return UNKNOWN
    if function is torch.is_floating_point:
        return (False,) if isinstance(_only(arguments[0]), Weight) else UNKNOWN
    return _of_python(model, function, arguments) if arguments else None


def _of_torch(module: nn.Module, name: str, arguments: Sequence[Value]) -> Value | None:
    """The results of methods of torch's modules that lead to other modules."""
    match name:
        case "parameters":
            return (Parameters(module),)
        case "children" | "modules" | "values":
            below = module.modules() if name == "modules" else module.children()
            return (Many(tuple((one,) for one in below)),)
        case "named_children" | "named_modules" | "items":
            named = module.named_modules() if name == "named_modules" else module.named_children()
            return (Many(tuple((Many(((key,), (one,))),) for key, one in named)),)
        case "get_submodule":
            found = dict(module.named_modules()).get(_only(arguments[0]), ANYTHING) if arguments else ANYTHING
            return (found,)
    return None


def _of_python(model: Model, function: Any, arguments: Sequence[Value]) -> Value | None:
    first = arguments[0]
    if function is isinstance:
        return merged(*((_is_instance(model, one, arguments[1]),) for one in first))
    if function is hasattr:
        return merged(*(_has(model, owner, name) for owner in first for name in arguments[1]))
    if function is getattr:
        return merged(*(_got(model, owner, name, arguments[2:]) for owner in first for name in arguments[1]))
    if function is zip:
        return (Many(((Many(tuple(merged(*map(items, value)) for value in arguments)),),)),)
    if function is enumerate:
        return (Many(((Many((UNKNOWN, merged(*map(items, first)))),),)),)
    if function is next:
        return merged(*(_next(model, one) for one in first))
    if function in (iter, list, tuple):
        return first
    return (Many((merged(*map(items, first)),)),) if function in (reversed, sorted, set) else None


def _has(model: Model, owner: Any, name: Any) -> Value:
    """The result of hasattr."""
    found = model.has(owner, name) if isinstance(name, str) else None
    return UNKNOWN if found is None else (found,)


def _got(model: Model, owner: Any, name: Any, default: Sequence[Value]) -> Value:
    """The result of getattr."""
    if isinstance(name, NamePattern) and isinstance(owner, nn.Module):
        return tuple(child for key, child in owner.named_children() if re.fullmatch(name.pattern, key))
    if not isinstance(name, str):
        return UNKNOWN
    if default and not isinstance(owner, STAND_INS) and not model.has(owner, name):
        return default[0]
    return (Lookup(owner, name),)


def _next(model: Model, iterator: Any) -> Value:
    if isinstance(iterator, Parameters):
        return model.first_parameter(iterator.module)
    parts = _parts(iterator)
    return parts[0] if isinstance(parts, list) and parts else UNKNOWN


def _is_instance(model: Model, one: Any, kinds: Value) -> Any:
    """The result of isinstance; a module that is to become int8 counts as what it will be."""
    wanted = [kind for value in kinds for kind in (items(value) if _parts(value) is not None else (value,))]
    own: tuple[type, str]
    if isinstance(one, Weight):
        own = (torch.nn.Parameter, "Int8Params")
    elif model.is_candidate(one):
        own = (nn.Linear, "Linear8bitLt")
    elif isinstance(one, STAND_INS):
        return ANYTHING
    else:
        own = (type(one), "")
    if not all(isinstance(kind, type) for kind in wanted):
        return ANYTHING
    return any(issubclass(own[0], kind) or kind.__name__ == own[1] for kind in wanted)


def _only(value: Value) -> Any:
    """The alternative, if there is exactly one."""
    return value[0] if len(value) == 1 else ANYTHING
