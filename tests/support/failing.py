"""A function of `os` that fails, for tests that know which call it is (faults.py has every one of C's fail)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any


def failing(name: str, nth: int = 0, about: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
    """What stands for it: fails (EIO) when it is called for the nth time, or with 0 always.

    Args:
        name: Of the function; `close` closes even so.
        nth: Of the calls that count, from 1 on.
        about: Of its arguments, whether a call counts.
    """
    genuine, made = getattr(os, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += about(*args, **kwargs)
        if not about(*args, **kwargs) or nth not in (0, made):
            return genuine(*args, **kwargs)
        if name == "close":
            genuine(*args)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return call
