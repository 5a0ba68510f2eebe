"""The functions of a model's classes: which could read the weights of other modules, and their source.

Bytecode shows which could. In most models none does, which saves parsing their source.
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import re
import tokenize
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Methods that are called while a model is built, changed or saved, not while it computes.
_NOT_COMPUTING = re.compile(
    r"__(?!call__)|_*(init|initialize|reset|tie|untie|resize|get_resized|rescale|prune|freeze|load|save|set)(_|$)"
)
# Packages whose functions call the modules they are passed, or take weights as tensors.
_OPAQUE = re.compile(r"(torch|transformers(?!\.models\.)|accelerate|bitsandbytes)(\.|$)")
_READ = ("weight", "parameters")
# A method as instances have it, followed by the overridden ones that it calls by `super()`.
Method = tuple[FunctionType, ...]


def is_opaque(function_or_class: Any) -> bool:
    """Whether its source need not be examined."""
    return _OPAQUE.match(getattr(function_or_class, "__module__", None) or "torch") is not None


def functions_to_read(modules: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, FunctionType]]:
    """Every module, by name, with each of its methods that could read a weight, directly or through calls."""
    classes: set[type] = {type(module) for module in modules.values()}
    methods = {cls: _methods(cls) for cls in classes}
    readers = {name for own in methods.values() for name, method in own.items() if any(map(_could_read, method))}
    if not readers:
        return
    _add_callers(readers, methods.values())
    wanted = {
        cls: [own[name][0] for name in own if _is_wanted(name, own[name], readers)] for cls, own in methods.items()
    }
    givers = _givers(modules, methods)
    for name, module in modules.items():
        entered = wanted[type(module)]
        yield from ((module, function) for function in entered)
        forward = methods[type(module)].get("forward", ())[:1] if name in givers else ()
        yield from ((module, function) for function in forward if function not in entered)


def _is_wanted(name: str, method: Method, readers: Collection[str]) -> bool:
    reads = any(_could_read(function) or _mentions(function, readers) for function in method)
    return reads and not _NOT_COMPUTING.match(name)


def _add_callers(readers: set[str], classes: Collection[Mapping[str, Method]]) -> None:
    """Adds the names of methods that mention one of `readers`, until none is left."""
    known = 0
    while known < len(readers):
        known = len(readers)
        mention = (
            name for own in classes for name, method in own.items() if any(_mentions(f, readers) for f in method)
        )
        readers |= set(mention)


def _givers(modules: Mapping[str, nn.Module], methods: Mapping[type, Mapping[str, Method]]) -> set[str]:
    """The names of the parents of modules whose `forward` reads the weight of a module passed to it."""
    classes = {cls for cls, own in methods.items() if any(map(_reads_argument, own.get("forward", ())))}
    given = [name for name, module in modules.items() if type(module) in classes]
    return {name[: dot.start()] for name in given for dot in re.finditer(r"^|\.", name)}


@lru_cache(maxsize=4096)
def _methods(cls: type) -> dict[str, Method]:
    """Functions and properties of a class and its bases."""
    found: dict[str, Method] = {}
    for base in reversed(cls.__mro__):
        for name, value in () if is_opaque(base) else vars(base).items():
            function = unwrapped(value)
            if function is not None:
                above = found.get(name, ()) if "super" in _names(function.__code__) else ()
                found[name] = (function, *above)
    return found


def unwrapped(attribute: Any) -> FunctionType | None:
    """The original function under decorators, properties and the like; None if there is none."""
    for inner in ("fget", "func", "__func__"):
        attribute = (inspect.getattr_static(attribute, inner, None) and getattr(attribute, inner)) or attribute
    try:
        function = inspect.unwrap(attribute)
    except ValueError:  # it wraps itself
        return None
    return function if inspect.isfunction(function) else None


@lru_cache(maxsize=4096)
def is_set_later(cls: type, name: str) -> bool:
    """Whether instances set such an attribute while they compute."""
    setters = (f for own, method in _methods(cls).items() if not _NOT_COMPUTING.match(own) for f in method)
    return any(name in _names(setter.__code__) and name in _set_by(setter.__code__) for setter in setters)


@lru_cache(maxsize=4096)
def _set_by(code: CodeType) -> frozenset[str]:
    instructions = (one for part in _codes(code) for one in dis.get_instructions(part))
    return frozenset(str(one.argval) for one in instructions if one.opname == "STORE_ATTR")


@lru_cache(maxsize=4096)
def _could_read(function: FunctionType) -> bool:
    """Whether it, or a function outside of classes that it calls, reads a weight that is not its own `self`'s."""
    seen: set[FunctionType] = set()
    todo = [function]
    while todo:
        current = todo.pop()
        if current not in seen and any(map(_reads, _codes(current.__code__))):
            return True
        todo += [] if current in seen else _helpers(current)
        seen.add(current)
    return False


def _helpers(function: FunctionType) -> list[FunctionType]:
    named = [function.__globals__.get(name) for name in _names(function.__code__)]
    found = [unwrapped(value) for value in named if inspect.isfunction(value) and not is_opaque(value)]
    return [helper for helper in found if helper is not None]


def _mentions(function: FunctionType, names: Collection[str]) -> bool:
    """Whether it names one of these methods; "forward" is named everywhere, so does not count."""
    return any(name != "forward" and name in names for name in _names(function.__code__))


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    return frozenset(name for part in _codes(code) for name in part.co_names)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Its code object, and those of the functions, lambdas and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _reads(code: CodeType) -> bool:
    return "weight" in code.co_consts or any(source != "self" for source in _sources(code))  # getattr's


def _reads_argument(function: FunctionType) -> bool:
    code = function.__code__
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return any(source in arguments for source in _sources(code))


def _sources(code: CodeType) -> Iterator[Any]:
    """What precedes each `.weight` or `.parameters`: the name of a variable or an attribute, or something else."""
    if any(name in code.co_names for name in _READ):
        for before, instruction in pairwise(dis.get_instructions(code)):
            if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and instruction.argval in _READ:
                yield before.argval[-1] if isinstance(before.argval, tuple) else before.argval


def names_read(function: FunctionType) -> set[str]:
    """The names of attributes whose weight it reads, from bytecode, for functions without source."""
    return {source for code in _codes(function.__code__) for source in _sources(code) if isinstance(source, str)}


@lru_cache(maxsize=4096)
def source_of(function: FunctionType) -> ast.FunctionDef | None:
    """Its syntax tree; None where its source is not available."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 :]
    try:
        block = "".join(inspect.getblock(lines))
        found = ast.parse(f"if True:\n{block}" if block[:1].isspace() else block)
    except (SyntaxError, tokenize.TokenError):  # the file has changed since
        return None
    nodes = (node for node in ast.walk(found) if isinstance(node, ast.FunctionDef))
    return next((node for node in nodes if node.name == code.co_name), None)
