"""Expressions of a function: their possible values, and where weights escape into a computation."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from pyint8.quantizer.reads import known
from pyint8.quantizer.reads.functions import is_opaque, unwrapped
from pyint8.quantizer.reads.values import (
    ANYTHING,
    UNKNOWN,
    Lookup,
    Many,
    Method,
    NamePattern,
    Property,
    Super,
    Value,
    bound,
    holds_module,
    merged,
)

if TYPE_CHECKING:
    from pyint8.quantizer.reads.interpreter import Interpreter


class Expressions:
    """The expressions of one function that is being interpreted.

    Args:
        interpreter: The interpreter it belongs to.
        function: The function.
        names: Its variables.
    """

    def __init__(self, interpreter: Interpreter, function: FunctionType, names: dict[str, Value]) -> None:
        self.interpreter = interpreter
        self.function = function
        self.names = names
        self.model = interpreter.model

    def use(self, value: Value) -> None:
        """A value is used in a computation."""
        self.interpreter.use(value, self.function)

    def value(self, node: ast.expr) -> Value:
        """The possible values of an expression."""
        match node:
            case ast.Constant(value=value):
                return (value,)
            case ast.Name(id=name):
                return self._variable(name)
            case ast.Attribute(value=owner, attr=name):
                return self.attribute(self.value(owner), name)
            case ast.Call():
                return self._call(node)
            case ast.Subscript(value=container, slice=index):
                return self._item(self.value(container), index)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return (Many(tuple(self.value(item) for item in items)),)
            case ast.Starred(value=inner):
                return self.items(self.value(inner))
            case ast.NamedExpr(target=ast.Name(id=name), value=inner):
                self.names[name] = self.value(inner)
                return self.names[name]
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self._comprehension(node)
            case _:
                return self._operation(node)

    def _operation(self, node: ast.expr) -> Value:
        """An operator: its result is unknown unless the model determines it."""
        match node:
            case ast.Compare(left=left, ops=[operation], comparators=[right]):
                return known.compared(self.value(left), operation, self.value(right))
            case ast.BoolOp(op=operation, values=values):
                return self._either(isinstance(operation, ast.And), values)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = known.truth(self.value(operand))
                return UNKNOWN if truth is None else (not truth,)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
                return (-number,)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                truth = known.truth(self.value(test))
                taken = [part for part, when in ((body, True), (orelse, False)) if truth in (when, None)]
                return merged(*(self.value(part) for part in taken))
            case ast.Lambda(args=arguments, body=body):
                inner = type(self)(self.interpreter, self.function, self.names | bound(arguments, (), {}))
                inner.use(inner.value(body))
            case ast.JoinedStr(values=parts):
                return (self._name_pattern(parts),)
            case ast.Compare():
                for part in ast.iter_child_nodes(node):
                    self._look_at(part)
            case _:
                self._use_parts(node)
        return UNKNOWN

    def _look_at(self, node: ast.AST) -> None:
        """Evaluates operands that are only compared or formatted."""
        if isinstance(node, ast.expr):
            self.value(node)

    def _name_pattern(self, parts: list[ast.expr]) -> NamePattern:
        texts = []
        for part in parts:
            self._look_at(part.value if isinstance(part, ast.FormattedValue) else part)
            texts.append(re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*")
        return NamePattern("".join(texts))

    def _use_parts(self, node: ast.AST) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.use(self.value(part))

    def _variable(self, name: str) -> Value:
        if name in self.names:
            return self.names[name]
        closed = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=False))
        for place in (self.function.__globals__, vars(builtins)):
            if name in place and name not in closed:
                return (place[name],)
        try:
            return (closed[name].cell_contents,)
        except (KeyError, ValueError):  # a local variable that is not set yet
            return UNKNOWN

    def attribute(self, owners: Value, name: str) -> Value:
        """The possible values of an attribute of any of these owners."""
        return merged(*(self._attribute_of(owner, name) for owner in owners))

    def _attribute_of(self, owner: Any, name: str) -> Value:
        found = self.model.attribute(owner, name)
        if found is None:
            self.use((owner,))
            return UNKNOWN
        return merged(*(self._looked_up(one) for one in found))

    def _looked_up(self, found: Any) -> Value:
        if not isinstance(found, Property):
            return (found,)
        function = unwrapped(found.function)
        if function is None or is_opaque(function):
            return UNKNOWN
        return self.interpreter.call(function, [(found.owner,)], {})

    def _either(self, every: bool, parts: Sequence[ast.expr]) -> Value:
        """`and` (with `every`) and `or`: the operands in order, until one decides."""
        seen: list[Value] = []
        for part in parts:
            seen.append(self.value(part))
            truth = known.truth(seen[-1])
            if truth is not None and truth != every:
                return seen[-1]
        decided = all(known.truth(value) is not None for value in seen)
        return seen[-1] if decided else merged(*seen)

    def items(self, values: Value) -> Value:
        """The possible items of any of these."""
        return merged(*(known.items(one) for one in values))

    def _item(self, containers: Value, index: ast.expr) -> Value:
        at = UNKNOWN if isinstance(index, ast.Slice) else self.value(index)
        self.use(at)
        return merged(*(known.item(one, at, sliced=isinstance(index, ast.Slice)) for one in containers))

    def assign(self, target: ast.expr, value: Value) -> None:
        """Assigns to variables; a value that is stored elsewhere is lost from sight, so counts as used."""
        match target:
            case ast.Name(id=name):
                self.names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for number, one in enumerate(targets):
                    self.assign(one, merged(*(known.unpacked(whole, number, len(targets)) for whole in value)))
            case ast.Starred(value=inner):
                self.assign(inner, (Many((self.items(value),)),))
            case _:
                self.use(value)
                for part in ast.iter_child_nodes(target):
                    self._look_at(part)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        outside = dict(self.names)
        for generator in node.generators:
            self.assign(generator.target, self.items(self.value(generator.iter)))
            for condition in generator.ifs:
                self.value(condition)
        items = self.value(node.elt)
        self.names = outside
        return (Many((items,)),)

    def _call(self, node: ast.Call) -> Value:
        arguments = [self.value(argument) for argument in node.args]
        keywords = {keyword.arg or "": self.value(keyword.value) for keyword in node.keywords}
        return merged(*(self._result(one, arguments, keywords) for one in self.value(node.func)))

    def _result(self, function: Any, arguments: list[Value], keywords: dict[str, Value]) -> Value:
        """The possible results of a call. A weight that is passed to an unknown function counts as read."""
        if function is super:
            return self._super(arguments)
        result = known.result(self.model, function, arguments)
        if result is not None:
            return merged(
                *(self.attribute((one.owner,), one.name) if isinstance(one, Lookup) else (one,) for one in result)
            )
        for value in (*arguments, *keywords.values()):
            self.use(value)
        called = _called(function, any(map(holds_module, (*arguments, *keywords.values()))))
        replaced = self.model.is_candidate(function.owner if isinstance(function, Method) else function)
        if called is None or is_opaque(called) or replaced:
            return UNKNOWN
        owner = [(function.owner,)] if isinstance(function, Method) else []
        owner += [(function,)] if isinstance(function, nn.Module) else []
        return self.interpreter.call(called, [*owner, *arguments], keywords)

    def _super(self, arguments: list[Value]) -> Value:
        cls = (arguments or [self._variable("__class__")])[0][0]
        first = self.function.__code__.co_varnames[:1]
        owners = arguments[1] if len(arguments) > 1 else self.names.get("".join(first), UNKNOWN)
        return tuple(Super(one, cls) if isinstance(cls, type) else ANYTHING for one in owners)


def _called(function: Any, is_given_modules: bool) -> FunctionType | None:
    """The function to interpret for a call. Modules, whose methods are interpreted anyway, and functions outside of
    classes are skipped unless they are passed modules."""
    if isinstance(function, Method):
        return unwrapped(function.function)
    if not is_given_modules:
        return None
    return unwrapped(type(function).forward if isinstance(function, nn.Module) else function)
