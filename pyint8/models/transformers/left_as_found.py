"""What transformers changes in the process while it builds a model is put back where Ctrl-C comes between.

transformers does so itself by context managers, but a signal may come once a change is made and before its manager is
on the stack: torch's default device would stay "meta", and every later tensor would be without data.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.utils._device
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from pyint8.models.transformers.compat import CHANGED_WHILE_BUILDING


@contextmanager
def left_as_found() -> Iterator[None]:
    """Around a from_pretrained; not two at a time, in whatever threads. Whatever ends it that is no error counts.

    Raises:
        KeyboardInterrupt: Also where transformers made another error of it while it cleaned up.
    """
    handled, found = sys.exc_info()[1], _Found()
    try:
        yield
    except BaseException as error:
        chain = list(_chain_of(error, handled))
        interrupt = error
        if isinstance(error, Exception):
            behind = next((each for each in chain if isinstance(each, KeyboardInterrupt)), None)
            if behind is None:
                raise
            interrupt = behind
        for each in chain:  # managers that were left without being told put things back now, not once it is forgotten
            traceback.clear_frames(each.__traceback__)
        found.put_back()
        if interrupt is error:
            raise
        raise interrupt from None


def _chain_of(error: BaseException, last: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose handling it came up, up to one that was being handled before."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at is not last and at not in seen:
        yield at
        seen.append(at)
        at = at.__cause__ or at.__context__


class _Found:
    """torch's modes and defaults, and the functions and flags of the modules in which transformers replaces some."""

    def __init__(self) -> None:
        layers = [each for each in vars(torch.nn.modules).values() if isinstance(each, ModuleType)]
        places = [torch, torch.utils._device, torch.nn.init, *layers, *CHANGED_WHILE_BUILDING]
        self._values: list[tuple[Any, dict[str, Any]]] = [(place, dict(vars(place))) for place in places]
        self._modes = _get_current_function_mode_stack()
        self._dtype = torch.get_default_dtype()
        self._has_gradients = torch.is_grad_enabled()

    def put_back(self) -> None:
        while _get_current_function_mode_stack():
            _pop_mode()
        for mode in self._modes:
            _push_mode(mode)
        torch.set_default_dtype(self._dtype)
        torch.set_grad_enabled(self._has_gradients)
        for place, values in self._values:
            for name, value in values.items():
                if vars(place).get(name) is not value:
                    setattr(place, name, value)
