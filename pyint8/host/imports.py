"""Heavy imports from several threads: torch and transformers are not made for two that begin at once."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

importing = threading.RLock()
"""Held while pyint8 imports torch, transformers and what needs them: two threads that import packages with circular
imports at the same time can find modules half initialized."""


def imported(name: str) -> ModuleType | None:
    """A module that is imported wholly; None if it is not, or if a thread is importing it at this moment."""
    module = sys.modules.get(name)
    is_half_there = getattr(getattr(module, "__spec__", None), "_initializing", False)
    return None if is_half_there else module
