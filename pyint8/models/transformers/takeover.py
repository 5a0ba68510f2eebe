"""Int8 loads of programs whose calls cannot be changed: transformers' quantizer gives way to pyint8's for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from pyint8.models.transformers.quantizer import StreamedInt8HfQuantizer

_INT8 = "bitsandbytes_8bit"


@contextmanager
def takeover() -> Iterator[None]:
    """See `pyint8.takeover`."""
    before = AUTO_QUANTIZER_MAPPING[_INT8]
    AUTO_QUANTIZER_MAPPING[_INT8] = StreamedInt8HfQuantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[_INT8] = before
