"""Int8 loads of programs whose calls cannot be changed: pyint8's quantizer replaces transformers' for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pyint8.errors import OptionError
from pyint8.models.transformers.compat import AUTO_QUANTIZER_MAPPING
from pyint8.models.transformers.hooks import StreamedInt8HfQuantizer
from pyint8.report import LoadReport, collected
from pyint8.streaming.ranks.ranks import join_ranks

_INT8 = "bitsandbytes_8bit"


class _Registry:
    """transformers' registry. Blocks may overlap, in threads or not: the first changes it, the last restores it."""

    def __init__(self) -> None:
        self.renew_lock()
        self._blocks: set[object] = set()
        self._genuine: Any = None

    def renew_lock(self) -> None:
        self._changing = threading.Lock()

    def enter(self, block: object) -> None:
        with self._changing:
            if not self._blocks:
                self._genuine = AUTO_QUANTIZER_MAPPING[_INT8]
            self._blocks.add(block)
            AUTO_QUANTIZER_MAPPING[_INT8] = StreamedInt8HfQuantizer

    def leave(self, block: object) -> None:
        """Idempotent, also if an earlier call was interrupted anywhere."""
        with self._changing:
            if self._blocks <= {block} and self._genuine is not None:
                AUTO_QUANTIZER_MAPPING[_INT8] = self._genuine
                self._genuine = None
            self._blocks.discard(block)


_registry = _Registry()
os.register_at_fork(after_in_child=_registry.renew_lock)


@contextmanager
def takeover(process_group: Any = None) -> Iterator[list[LoadReport]]:
    """See `pyint8.takeover`."""
    block = object()
    ranks = None if process_group is None else join_ranks(process_group)
    try:
        with nullcontext() if ranks is None else ranks.together(), _taken_over(block), collected() as reports:
            yield reports
    except TypeError as error:
        if "unexpected keyword argument 'load_in_8bit'" not in str(error):
            raise
        raise OptionError(
            "transformers 5 has no load_in_8bit argument of from_pretrained; pass "
            "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
        ) from error


@contextmanager
def _taken_over(block: object) -> Iterator[None]:
    try:
        try:
            _registry.enter(block)
            yield
        finally:
            _registry.leave(block)
    finally:  # again: Ctrl-C may have come in between
        _registry.leave(block)
