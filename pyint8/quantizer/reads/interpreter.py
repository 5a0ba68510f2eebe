"""An abstract interpreter: it follows code with the model's own objects where they are known, else along every path.

It looks for places where the weight of a module that is to become int8 enters a computation, or its dtype a cast.
Conditions are evaluated where the model determines them (`self.config.pretraining_tp > 1`; `weight.dtype !=
torch.int8`, since it will be int8); otherwise both branches count.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

from torch import nn

from pyint8.quantizer.reads import known
from pyint8.quantizer.reads.expressions import Expressions
from pyint8.quantizer.reads.functions import names_read, source_of
from pyint8.quantizer.reads.values import UNKNOWN, Many, Model, Value, Weight, WeightDtype, bound, merged

logger = logging.getLogger(__name__)


class Interpreter:
    """Interprets functions, each once for the same arguments.

    Attributes:
        model: The objects that code can reach.
        read: The modules whose weight is read, with the name of a function that reads it.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.read: dict[nn.Module, str] = {}
        self._results: dict[Any, Value] = {}

    def enter(self, module: nn.Module, function: FunctionType) -> None:
        """Interprets a method of `module`, called with unknown arguments."""
        if source_of(function) is None:
            self._read_by_name(module, function)
            return
        try:
            returned = self.call(function, [(module,)], {})
        except Exception:  # unforeseen code must not keep a model from loading
            logger.debug("%s cannot be followed", function.__qualname__, exc_info=True)
            self._read_by_name(module, function)
            return
        if function.__name__ == "forward":
            self.use(returned, function)

    def call(self, function: FunctionType, arguments: Sequence[Value], keywords: Mapping[str, Value]) -> Value:
        """The possible results."""
        tree = source_of(function)
        if tree is None:
            return UNKNOWN
        names = bound(tree.args, arguments, keywords)
        key = (function, *names.items())
        if key not in self._results:
            self._results[key] = UNKNOWN  # for recursive calls
            self._results[key] = Frame(self, function, names).run(tree.body)
        return self._results[key]

    def use(self, value: Value, function: FunctionType) -> None:
        """Notes that `function` computes with a value."""
        for one in value:
            if isinstance(one, (Weight, WeightDtype)):
                self.read.setdefault(one.module, function.__qualname__)
            elif isinstance(one, Many):
                for item in one.items:
                    self.use(item, function)

    def _read_by_name(self, module: nn.Module, function: FunctionType) -> None:
        """For functions without source: all modules below count that have the name of one whose weight is read."""
        leaves = names_read(function)
        for name, below in module.named_modules():
            if name.rpartition(".")[2] in leaves and self.model.is_candidate(below):
                self.read.setdefault(below, function.__qualname__)


class Frame(Expressions):
    """The statements of one function that is being interpreted."""

    def run(self, body: Sequence[ast.stmt]) -> Value:
        """The possible results."""
        self.returned: Value = ()
        self._block(body)
        return self.returned or (None,)

    def _block(self, statements: Sequence[ast.stmt]) -> bool:
        """Interprets statements in order; whether what follows them is never reached."""
        return any(self._statement(statement) for statement in statements)

    def _statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Return(value=value):
                self.returned = merged(self.returned, (None,) if value is None else self.value(value))
                return True
            case ast.Raise() | ast.Break() | ast.Continue():
                return True
            case ast.If(test=test, body=body, orelse=orelse):
                return self._branch(known.truth(self.value(test)), body, orelse)
            case ast.With(items=items, body=body):
                self._enter_contexts(items)
                return self._block(body)
            case ast.FunctionDef(args=arguments, body=body):
                self._define(arguments, body)
            case _:
                self._step(node)
        return False

    def _step(self, node: ast.stmt) -> None:
        """A statement that the next one follows."""
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self.assign(target, self.value(value))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.value(value))
            case ast.AugAssign(target=target, value=value):
                self.use(merged(self.value(target), self.value(value)))
            case ast.Expr(value=value) | ast.Assert(test=value):
                self.value(value)
            case ast.For(target=target, iter=iterated, body=body, orelse=orelse):
                self.assign(target, self.items(self.value(iterated)))
                self._maybe(body, body, orelse)  # twice: a variable may be set in the previous iteration
            case ast.While(test=test, body=body, orelse=orelse):
                self.value(test)
                self._maybe(body, body, orelse)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=finalbody):
                self._maybe(body, *(handler.body for handler in handlers), orelse, finalbody)

    def _branch(self, condition: bool | None, body: Sequence[ast.stmt], orelse: Sequence[ast.stmt]) -> bool:
        """Interprets the branches that a condition (None if unknown) permits; returns as `_block` does."""
        if condition is not None:
            return self._block(body if condition else orelse)
        before = dict(self.names)
        ends = self._block(body)
        after, self.names = self.names, before
        ends_too = self._block(orelse)
        if ends_too:
            self.names = after
        elif not ends:
            self._join(after)
        return ends and ends_too

    def _maybe(self, *blocks: Sequence[ast.stmt]) -> None:
        """Interprets blocks, each of which may be skipped or left early."""
        for block in blocks:
            before = dict(self.names)
            self._block(block)
            self._join(before)

    def _join(self, others: Mapping[str, Value]) -> None:
        """Variables may have their values here, or those in `others`."""
        names = {**others, **self.names}
        self.names = {name: merged(self.names.get(name, UNKNOWN), others.get(name, UNKNOWN)) for name in names}

    def _enter_contexts(self, items: Sequence[ast.withitem]) -> None:
        for item in items:
            value = self.value(item.context_expr)
            if item.optional_vars is not None:
                self.assign(item.optional_vars, value)

    def _define(self, arguments: ast.arguments, body: Sequence[ast.stmt]) -> None:
        """A nested function, which may be called with anything."""
        inner = Frame(self.interpreter, self.function, self.names | bound(arguments, (), {}))
        self.use(inner.run(body))
