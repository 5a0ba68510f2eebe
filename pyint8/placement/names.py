"""Names of modules: the one that was meant by another, whatever the numbers in it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

ANY_NUMBER = r"\d+"


def without_numbers(name: str) -> str:
    """A name as an expression for all that differ from it by the numbers of layers alone."""
    return re.sub(r"(?<![^.])\d+(?![^.])", lambda _: ANY_NUMBER, name)


def with_numbers(expression: str, name: str) -> str:
    """An expression of `without_numbers` with the numbers in `name`; as it is if there are not as many."""
    numbers = re.findall(r"\d+", name)
    if expression.count(ANY_NUMBER) == len(numbers):
        for number in numbers:
            expression = expression.replace(ANY_NUMBER, number, 1)
    return expression


def nearest_name(name: str, names: Collection[str]) -> str | None:
    """The one of `names` most like `name`; None if none is like it."""
    kinds = {without_numbers(each): each for each in sorted(names)}
    found = difflib.get_close_matches(without_numbers(name), kinds, n=1)
    if not found:
        return None
    nearest = with_numbers(found[0], name)
    return nearest if nearest in names else kinds[found[0]]


def listed_with_nearest(nearest: dict[str, str | None]) -> str:
    """Names that are nothing's, for a message, each with the nearest that is something's, if there is one."""
    return ", ".join(f"'{name}'" + (f" (nearest: '{near}')" if near else "") for name, near in nearest.items())
