"""How long a thread of Python that computes keeps others waiting."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

from pyint8.host.settings import SharedSetting

# See docs/performance.md, "Ranks".
_SECONDS = 2e-5

_interval = SharedSetting(
    sys.getswitchinterval, lambda before: sys.setswitchinterval(min(before, _SECONDS)), sys.setswitchinterval
)


def quick_switches() -> AbstractContextManager[None]:
    """In this block a thread that wants to run does so after 20 microseconds, not after Python's usual five.

    For a thread that has little to do but often, beside one that computes. It holds for the process: other threads
    switch more often, too.
    """
    return _interval.changed()
