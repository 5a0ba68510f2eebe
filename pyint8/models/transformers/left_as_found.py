"""What transformers changes in the process while it builds a model is put back where Ctrl-C comes between.

transformers does so itself by context managers, but a signal may come once a change is made and before its manager is
on the stack: torch's default device would stay "meta", and every later tensor would be without data.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.utils._device
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from pyint8.models.transformers.compat import CHANGED_WHILE_BUILDING

_Model = TypeVar("_Model")


def left_as_found(load: Callable[[], _Model]) -> _Model:
    """Calls `load`, a from_pretrained, and returns its model; if it ends by what is no error, all is put back.

    Not a context manager: one that Ctrl-C ends outside of its block would put things back once it is forgotten.

    Args:
        load: One at a time, in whatever threads.

    Raises:
        KeyboardInterrupt: Also where transformers made another error of it while it cleaned up.
    """
    handled, found = sys.exc_info()[1], _Found()
    try:
        return load()
    except BaseException as error:
        try:
            interrupt = _mended(error, handled, found)
        finally:  # again: another Ctrl-C may have come in between
            interrupt = _mended(error, handled, found)
        if interrupt is None or interrupt is error:
            raise
        raise interrupt from None


def _mended(error: BaseException, handled: BaseException | None, found: _Found) -> BaseException | None:
    """Puts all back if Ctrl-C, or something else that is no error, is behind an error, and returns that. Idempotent."""
    chain = list(_chain_of(error, handled))
    kind = KeyboardInterrupt if isinstance(error, Exception) else BaseException
    interrupt = next((each for each in chain if isinstance(each, kind)), None)
    if interrupt is not None:
        for each in chain:  # managers that were left without being told put things back now, not once it is forgotten
            traceback.clear_frames(each.__traceback__)
        found.put_back()
    return interrupt


def _chain_of(error: BaseException, last: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose handling it came up, up to one that was being handled before."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at is not last and at not in seen:
        yield at
        seen.append(at)
        at = at.__context__


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
        torch.set_default_dtype(self._dtype)
        torch.set_grad_enabled(self._has_gradients)
        for place, values in self._values:
            for name, value in values.items():
                if vars(place).get(name) is not value:
                    setattr(place, name, value)
        for mode in self._modes:  # last: calls of torch pass through them
            _push_mode(mode)
