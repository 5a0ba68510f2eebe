"""Int8 loads of programs whose calls cannot be changed: transformers' quantizer gives way to pyint8's for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from pyint8.models.transformers.quantizer import StreamedInt8HfQuantizer

_INT8 = "bitsandbytes_8bit"


class _Registry:
    """transformers', where blocks may overlap, in threads or not: the first in changes it, the last out restores it."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._blocks = 0
        self._genuine: Any = None

    def enter(self) -> None:
        with self._changing:
            if self._blocks == 0:
                self._genuine = AUTO_QUANTIZER_MAPPING[_INT8]
                AUTO_QUANTIZER_MAPPING[_INT8] = StreamedInt8HfQuantizer
            self._blocks += 1

    def leave(self) -> None:
        with self._changing:
            self._blocks -= 1
            if self._blocks == 0:
                AUTO_QUANTIZER_MAPPING[_INT8] = self._genuine


_registry = _Registry()


@contextmanager
def takeover() -> Iterator[None]:
    """See `pyint8.takeover`."""
    _registry.enter()
    try:
        yield
    finally:
        _registry.leave()
