"""What the garbage collector knows of."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any


def of_kinds(kinds: Sequence[type], *, but: Sequence[Any] = ()) -> list[Any]:
    """All objects of these very classes that it tracks, but for some."""
    known = {id(value) for value in but}
    return [value for value in gc.get_objects() if type(value) in kinds and id(value) not in known]
