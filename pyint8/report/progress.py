"""A bar in bytes for a load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pyint8.host.imports import imported
from pyint8.host.processes import processes


class ByteProgress:
    """Shows bytes landed and bytes per second on stderr; silent unless asked for, or on a terminal or in a notebook.

    Args:
        shown: True or False to ask for it or not; None shows it on a terminal and in a notebook, unless bars are
            switched off (`HF_HUB_DISABLE_PROGRESS_BARS`, `transformers.utils.logging.disable_progress_bar()`), or this
            is one of torchrun's processes, and not the first of its host.
    """

    def __init__(self, shown: bool | None) -> None:
        self._asked = shown
        self._bar: Any = None

    @property
    def is_shown(self) -> bool:
        return _is_wanted() if self._asked is None else self._asked

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int) -> None:
        """Begins a bar of `total` bytes."""
        if self.is_shown:
            self._bar = _bar_maker()(total=total, unit="B", unit_scale=True, desc="Loading int8", file=sys.stderr)

    def advance(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(nbytes)


def _is_wanted() -> bool:
    from huggingface_hub.utils import are_progress_bars_disabled  # transformers' switch sets this one too

    is_first = processes().local_rank == 0
    return is_first and (sys.stderr.isatty() or _in_notebook()) and not are_progress_bars_disabled()


def _in_notebook() -> bool:
    get_ipython = getattr(imported("IPython"), "get_ipython", None)
    shell = None if get_ipython is None else get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _bar_maker() -> Callable[..., Any]:
    """transformers' own, which knows notebooks and its users' hooks; tqdm's where transformers is not imported."""
    logging = imported("transformers.utils.logging")
    if logging is not None and logging.is_progress_bar_enabled():
        return logging.tqdm  # type: ignore[no-any-return]
    from tqdm import auto

    maker: Callable[..., Any] = auto.tqdm
    return maker
