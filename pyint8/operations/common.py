"""What several verbs do at their start."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyint8.config import StreamOptions
from pyint8.errors import OptionError
from pyint8.host.imports import imported
from pyint8.host.memory import peak_resident_bytes
from pyint8.report import LoadReport

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint
    from pyint8.streaming.preparation import Preparation


def decoded(path: Any) -> str:
    """A path as a string.

    Raises:
        OptionError: It is none.
    """
    try:
        return os.fsdecode(path)
    except TypeError:
        raise OptionError(f"path is {path!r}; it must be a folder or a hub id") from None


def is_of_transformers(model: object) -> bool:
    """Whether it is a model of transformers'."""
    transformers = imported("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def check_options(options: object) -> None:
    """Raises OptionError unless it is a StreamOptions or None."""
    if options is not None and not isinstance(options, StreamOptions):
        raise OptionError(f"options is {reprlib.repr(options)}; it must be a pyint8.StreamOptions or None")


def prepare(checkpoint: Checkpoint | None, options: StreamOptions) -> Preparation:
    """What begins before anything heavy is imported (see `Preparation`)."""
    from pyint8.streaming.preparation import Preparation  # here, since `import pyint8` does not load the extension

    return Preparation(checkpoint, options)


@contextmanager
def measured_memory(report: LoadReport) -> Iterator[None]:
    """Fills in the report's peaks."""
    import torch

    before = peak_resident_bytes()
    if torch.cuda.is_initialized():  # otherwise its peak is zero anyway
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    yield
    report.host_peak_bytes = peak_resident_bytes() - before
    if torch.cuda.is_initialized():
        peaks = {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
        report.device_peak_bytes = {name: peak for name, peak in peaks.items() if peak}
