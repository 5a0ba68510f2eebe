"""How long a thread of Python that computes keeps others waiting."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# See docs/performance.md, "Ranks".
_SECONDS = 1e-4

_lock = threading.Lock()
_blocks = 0
_before = 0.0


@contextmanager
def quick_switches() -> Iterator[None]:
    """In this block a thread that wants to run does so after a tenth of a millisecond, not after Python's usual five.

    For a thread that has little to do but often, beside one that computes. It holds for the process: other threads
    switch more often, too.
    """
    global _blocks, _before
    with _lock:
        _blocks += 1
        if _blocks == 1:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, _SECONDS))
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                sys.setswitchinterval(_before)
