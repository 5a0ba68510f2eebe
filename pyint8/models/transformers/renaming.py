"""transformers' own renamings of a checkpoint's names, without doing the same for each of thousands of experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pyint8.models.transformers.compat import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    renames_by_patterns,
)

_EXPERTS = ".experts."

Renamed = tuple[str, str | None]
"""A name, and the pattern of the converter that matched, if one did."""

Resolved = tuple[str, str, WeightConverter | None, str | None]
"""(renamed, name in the model, converter, pattern of it that matched)."""


class Renamer:
    """What names of a checkpoint are in a model.

    Args:
        conversions: transformers' renamings and converters for the model.
        prefix: Of the base model in it.
        parameters: The model's names.
    """

    def __init__(self, conversions: Sequence[WeightTransform], prefix: str, parameters: Mapping[str, Any]) -> None:
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = prefix
        self._parameters = parameters
        self._ignores_digits = all(renames_by_patterns(each) and not _names_digits(each) for each in conversions)
        self._of_experts = cache(self._of_any_expert)
        self._with_prefix = cache(self._prefixed)

    def resolve(self, key: str) -> Resolved:
        """What a name of the checkpoint becomes.

        Names that differ in the number of an expert alone are renamed alike, if two of them become the same. For
        patterns that name no digit tell numbers of one length apart by nothing: what becomes of such names differs in
        the digits of the number alone, or not at all. Two numbers that have no digit in common show which it is.
        """
        head, _, rest = key.partition(_EXPERTS)
        number, _, leaf = rest.partition(".")
        if leaf and self._ignores_digits and number.isdecimal() and number.isascii():
            found = self._of_experts(head, len(number), leaf)
            if found is not None and (found[1] in self._parameters or key not in self._parameters):
                return found
        found = self._resolved(*self._compute(key))
        if found[1] not in self._parameters and key in self._parameters:  # it should not have been renamed
            found = self._resolved(key, None)
        return found

    def _of_any_expert(self, head: str, length: int, leaf: str) -> Resolved | None:
        """What all names become that differ in the number of an expert, of so many digits; None if they differ."""
        one, other = (self._compute(f"{head}{_EXPERTS}{digit * length}.{leaf}") for digit in "12")
        return self._resolved(*one) if one == other else None

    def _resolved(self, renamed: str, pattern: str | None) -> Resolved:
        converter = None if pattern is None else self._by_pattern[pattern]
        return renamed, self._with_prefix(renamed), converter, pattern

    def _compute(self, key: str) -> Renamed:
        found: Renamed = rename_source_key(key, self._renamings, self._converters)
        return found

    def _prefixed(self, key: str) -> str:
        return str(rename_source_key(key, [], [], self._prefix, self._parameters)[0])


def _names_digits(transform: WeightTransform) -> bool:
    return any(re.search(r"\d", pattern) for pattern in transform.source_patterns)


def in_loading_order(names: Sequence[str]) -> list[str]:
    """Names in the order of transformers' loop, which sorts by what lies between dots."""
    key_of = cache(dot_natural_key)

    def key(name: str) -> Any:
        head, experts, rest = name.partition(_EXPERTS)
        return [*key_of(head), *key_of(experts[1:] + rest)] if experts else key_of(name)

    return sorted(names, key=key)
