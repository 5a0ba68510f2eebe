"""Settings of the process that blocks of code change together: the first changes one, the last sets it back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class SharedSetting(Generic[_Value]):
    """One setting. Blocks may overlap, in threads or not.

    Args:
        read: Its value; not None.
        change: Changes it from that value; called as each block begins.
        restore: Sets it back to that value.
        restore_in_child: The same in a forked child, where the other threads' blocks never end; by default `restore`.
    """

    def __init__(
        self,
        read: Callable[[], _Value],
        change: Callable[[_Value], object],
        restore: Callable[[_Value], object],
        restore_in_child: Callable[[_Value], object] | None = None,
    ) -> None:
        self._read, self._change, self._restore = read, change, restore
        self._restore_in_child = restore_in_child or restore
        self._lock = threading.RLock()
        self._blocks: set[object] = set()
        self._before: _Value | None = None  # while it is changed
        os.register_at_fork(after_in_child=self._forget)

    @contextmanager
    def changed(self) -> Iterator[None]:
        """A block during which it is changed."""
        block = object()
        try:
            try:
                self._begin(block)
                yield
            finally:
                self._end(block)
        finally:  # again: Ctrl-C may have come in between
            self._end(block)

    def _begin(self, block: object) -> None:
        with self._lock:
            if not self._blocks:
                self._before = self._read()
            self._blocks.add(block)
            assert self._before is not None
            self._change(self._before)

    def _end(self, block: object) -> None:
        """Idempotent, also if an earlier call was interrupted anywhere."""
        with self._lock:
            self._blocks.discard(block)
            if self._before is not None and not self._blocks:
                self._restore(self._before)
                self._before = None

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._blocks.clear()
        if self._before is not None:
            self._restore_in_child(self._before)
        self._before = None
