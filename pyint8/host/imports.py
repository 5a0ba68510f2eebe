"""Heavy imports from several threads: torch and transformers cannot be imported by two at once."""

from __future__ import annotations

import os
import sys
import threading
from types import ModuleType

importing = threading.RLock()
"""Held while pyint8 imports torch, transformers and what needs them: two threads that import packages with circular
imports at the same time can find modules half initialized. A fork waits for it: the child would have modules that stay
half initialized, and locks on them that nobody opens."""

os.register_at_fork(before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release)


def imported(name: str) -> ModuleType | None:
    """A module that is completely imported; None if it is not, or if a thread is importing it right now."""
    module = sys.modules.get(name)
    is_half_there = getattr(getattr(module, "__spec__", None), "_initializing", False)
    return None if is_half_there else module
