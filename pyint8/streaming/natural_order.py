"""Names in the order in which people count: "layers.9" before "layers.10"."""

from __future__ import annotations

import re
import sys
from functools import lru_cache


@lru_cache(4096)  # of thousands of experts
def natural_key(name: str) -> str:
    """Sorts names; numbers in them may have any length.

    Text, numbers preceded by how long they are, which sort after text, and for dots what sorts before both.
    """
    pieces = re.split(r"([0-9]+|\.)", name)  # those at odd places are numbers and dots
    return "".join(_sortable(piece) if at % 2 else f"\1{piece}" for at, piece in enumerate(pieces))


def _sortable(piece: str) -> str:
    if piece == ".":
        return "\0"
    digits = piece.lstrip("0")
    return f"\2{chr(min(len(digits), sys.maxunicode))}{digits}"
