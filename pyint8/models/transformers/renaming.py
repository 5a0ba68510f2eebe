"""transformers' own renamings of a checkpoint's names, without doing the same for each of thousands of experts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
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
    """Names in the order of transformers' loop, which sorts by what lies between dots.

    Those of a layer's experts come together; in which order is found out once for all layers.
    """
    units: list[tuple[Any, bool, list[tuple[str, str]]]] = []  # one name, or a layer's experts
    layers: dict[str, list[tuple[str, str]]] = {}
    alike: dict[tuple[Any, ...], list[tuple[str, str]]] = {}  # layers whose names say the same: "01" and "1"
    for name in names:
        head, experts, rest = name.partition(_EXPERTS)
        if not experts:
            units.append((dot_natural_key(name), False, [("", name)]))
            continue
        layer = layers.get(head)
        if layer is None:
            key = dot_natural_key(head + _EXPERTS.rstrip("."))
            layer = layers[head] = alike.setdefault(tuple(key), [])
            if not layer:
                units.append((key, True, layer))
        layer.append((rest, name))
    places = _places({rest for layer in layers.values() for rest, _ in layer})
    for layer in layers.values():
        layer.sort(key=lambda pair: places[pair[0]])
    units.sort(key=lambda unit: unit[:2])
    return [name for _, _, named in units for _, name in named]


def _places(names: Iterable[str]) -> dict[str, int]:
    """Numbers that sort as transformers sorts the names."""
    ordered = sorted(names, key=dot_natural_key)
    groups = [list(group) for _, group in itertools.groupby(ordered, key=dot_natural_key)]
    return {name: place for place, group in enumerate(groups) for name in group}
