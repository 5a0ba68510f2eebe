"""A bar in bytes for a load."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm


class ByteProgress:
    """Shows bytes landed and bytes per second on stderr; silent unless asked for or on a terminal.

    Args:
        shown: True or False to ask for it or not; None shows it on a terminal.
    """

    def __init__(self, shown: bool | None) -> None:
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int) -> None:
        """Begins a bar of `total` bytes."""
        if self._shown:
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="Loading int8", file=sys.stderr)

    def advance(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(nbytes)
