"""Lists of modules to leave unquantized: how entries match, which match nothing, and what those may have meant."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from torch import nn

from pyint8.errors import OptionError
from pyint8.placement.names import ANY_NUMBER, listed_with_nearest, with_numbers, without_numbers
from pyint8.quantizer.modules import is_linear

logger = logging.getLogger(__name__)

# Whether a module's name is in a list.
Matches = Callable[[str, list[str]], bool]


def name_matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name is among `patterns`: as transformers 5 matches `llm_int8_skip_modules`.

    A pattern matches from the start up to a module's boundary, as a plain name or a regular expression, or as a
    suffix (source: transformers.quantizers.quantizers_utils.should_convert_module).
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in patterns)


def entry_for(name: str, others: Iterable[str]) -> str:
    """An entry that matches the module of this name, and none of the other linear modules."""
    return rf"^{re.escape(name)}$" if any(other.endswith(name) for other in others) else name


def check_entries(entries: Iterable[str]) -> None:
    """Raises OptionError for an entry that is no regular expression (every name is one)."""
    for entry in entries:
        _check_entry(entry)


def _check_entry(entry: str) -> None:
    try:
        re.compile(entry)
    except re.error as error:
        raise OptionError(
            f"the entry {entry!r} of skip_modules is neither a name nor a regular expression ({error}); in one, '.*' "
            "stands for anything, and names may be shortened from the front: 'down_proj'"
        ) from None


def warn_of_dead_entries(model: nn.Module, entries: Sequence[str], matches: Matches) -> None:
    """One warning for all entries that leave nothing unquantized, each with the nearest one that would.

    Args:
        model: Before anything in it is replaced.
        entries: The entries that were given.
        matches: How an entry matches.
    """
    linear = {name: None for name, module in model.named_modules() if is_linear(module)}
    dead = dead_entries(model, entries, linear, matches)
    if not dead:
        return
    nearest = {entry: nearest_entry(entry, linear) for entry in dead}
    logger.warning(
        "of skip_modules (llm_int8_skip_modules), these match no linear module of this %s, so they have no effect: %s; "
        "an entry matches a module's full name from its start, or at its end",
        type(model).__name__,
        listed_with_nearest(nearest),
    )


def dead_entries(model: nn.Module, entries: Sequence[str], linear: Collection[str], matches: Matches) -> list[str]:
    """Entries without effect: they match nothing, or no linear module inside what they match."""
    idle = [entry for entry in dict.fromkeys(entries) if not any(matches(name, [entry]) for name in linear)]
    if not idle:
        return []
    others = [name for name, _ in model.named_modules() if name not in linear]
    others += [name for name, _ in model.named_parameters()]
    left = {name for name in linear if not matches(name, list(entries))}
    around = {name[: dot.start()] for name in left for dot in re.finditer(r"\.", name)}

    def is_dead(entry: str) -> bool:
        named = [name for name in others if matches(name, [entry])]
        return not named or any(name in around or name.rpartition(".")[0] in left for name in named)

    return list(filter(is_dead, idle))


def nearest_entry(entry: str, linear: Iterable[str]) -> str | None:
    """The entry most like `entry` that matches linear modules; None if none is like it."""
    meant: dict[str, set[str]] = {}
    for name in dict.fromkeys(without_numbers(name) for name in linear):
        for part, whole in _parts(name):
            meant.setdefault(part, set()).add(whole)
    found = difflib.get_close_matches(without_numbers(entry), meant, n=1)
    if not found:
        return None
    wholes = meant[found[0]]
    nearest = wholes.pop() if len(wholes) == 1 else rf".*\.{found[0]}"
    return with_numbers(nearest, entry)


def _parts(name: str) -> Iterator[tuple[str, str]]:
    """Every run of a name's parts, with an entry that matches it: the run itself if at the end, else all up to it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        for start in range(end):
            part = ".".join(parts[start:end])
            is_suffix = end == len(parts) and ANY_NUMBER not in part
            yield part, part if is_suffix else ".".join(parts[:end])
