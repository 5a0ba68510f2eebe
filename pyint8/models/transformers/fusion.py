"""Conversions that only put tensors side by side, so that each can land in its place: merges of experts."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from math import prod

import torch

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.models.assembly import ExpertPart
from pyint8.models.checks import SCALES
from pyint8.models.transformers.compat import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
    converts_on_cpu,
    for_other_names,
    in_conversions,
    renames_back,
)
from pyint8.models.transformers.plan import Target
from pyint8.quantizer import EXPERT_SCALES
from pyint8.streaming.requests import Part, is_plain, kernels_cast

_WEIGHT = ".weight"


def find_parts(target: Target, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Part]:
    """Where each source of `target` lies in what its converter makes of them, by checkpoint name.

    Empty where the converter does more than stack experts along a new first dimension (and concatenate what it stacked
    along the next one), or where the sources do not fit together, which the converter itself says best.

    Args:
        target: One parameter and its sources.
        checkpoint: Has the sources.
        dtype: What the parameter will be.
    """
    converter = target.converter
    if converter is None or not is_plain_merge(converter):
        return {}
    found = dict(target.sources)
    stacks = [
        [checkpoint[name] for name, matched in found.items() if matched == pattern]
        for pattern in converter.source_patterns
    ]
    if not _fit_together([entry for stack in stacks for entry in stack], dtype) or not _are_even(stacks):
        return {}
    return _side_by_side(target.name, stacks)


def expert_parts(
    target: Target, checkpoint: Checkpoint, shape: tuple[int, ...], *, transposed: bool
) -> list[ExpertPart]:
    """Which rows of int8 experts each tensor of the checkpoint makes, in the order in which they are read.

    Empty where a converter does more than put the weights of experts side by side.

    Args:
        target: The weights of all experts of a module, and their sources.
        checkpoint: Has the sources.
        shape: Of the codes, [experts, out, in].
        transposed: Whether one tensor that holds them all is [experts, in, out].
    """
    experts, out, inner = shape
    if target.source is not None:
        entry = checkpoint[target.source]
        if entry.dtype == "I8":  # codes of all experts, as they will lie in memory
            if target.scales is None:
                return []
            scales = checkpoint[target.scales]
            return [ExpertPart(entry.element(i), i, 0, scales=scales.element(i)) for i in range(experts)]
        each = [entry.element(index) for index in range(experts)]
        return [ExpertPart(part, index, 0, transposed) for index, part in enumerate(each)]
    converter = target.converter
    if converter is None or not is_plain_merge(converter):
        return []
    by_pattern: dict[str | None, list[Entry]] = {}
    for name, pattern in target.sources:
        by_pattern.setdefault(pattern, []).append(checkpoint[name])
    stacks = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
    if not _are_even(stacks) or sum(stack[0].torch_shape[0] for stack in stacks) != out:
        return []
    if any(stack[0].torch_shape[1:] != (inner,) or len(stack) != experts for stack in stacks):
        return []
    rows = itertools.accumulate((stack[0].torch_shape[0] for stack in stacks[:-1]), initial=0)
    scales_of = {name: checkpoint[scales] for name, scales in target.scales_of.items()}
    made = [
        [ExpertPart(entry, index, row, scales=scales_of.get(entry.name)) for index, entry in enumerate(stack)]
        for row, stack in zip(rows, stacks, strict=True)
    ]
    # Expert by expert, as they will lie in memory: the GPU's consumer quantizes what lies together by one call.
    return list(itertools.chain.from_iterable(zip(*made, strict=True)))


def to_revert(
    used: Sequence[WeightTransform], conversions: Sequence[WeightTransform], experts: Collection[str]
) -> list[WeightTransform]:
    """What saving a model reverts: what loading it has used, and of int8 experts the merges that put them side by side,
    whether the checkpoint had them whole or not; with their scales.

    Args:
        used: Of `conversions`, those that matched something.
        conversions: transformers' own for the model.
        experts: Names of the weights of int8 experts.
    """
    left, merges = set(experts), []
    for one in sorted(conversions, key=lambda one: all(one is not other for other in used)):
        if isinstance(one, WeightConverter) and is_plain_merge(one) and (found := in_conversions([one], left)):
            merges.append(one)
            left -= found
    kept = [one for one in conversions if any(one is other for other in (*used, *merges))]
    renamed = [one for one in used if _renames_weights(one) and renames_back(one, experts)]
    return [*kept, *(for_other_names(one, _scales_of) for one in (*renamed, *merges))]


def _renames_weights(one: WeightTransform) -> bool:
    return all(pattern.endswith(_WEIGHT) for pattern in one.source_patterns)


def _scales_of(pattern: str) -> str:
    """Of a pattern of names of weights, that of their scales."""
    is_one = pattern.endswith(_WEIGHT)
    return f"{pattern.removesuffix(_WEIGHT)}.{SCALES}" if is_one else f"{pattern}{EXPERT_SCALES}"


def is_plain_merge(converter: WeightConverter) -> bool:
    """Whether it only stacks tensors along a new first dimension, and concatenates such stacks along the next one."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    merge, concatenate = (MergeModulelist, 0), (Concatenate, 1)
    patterns = len(converter.source_patterns)
    is_merge = kinds == [merge, concatenate] or (kinds == [merge] and patterns == 1)
    return is_merge and len(converter.target_patterns) == 1 and not converts_on_cpu(converter)


def _fit_together(entries: Sequence[Entry], dtype: torch.dtype) -> bool:
    """Whether all are plain bytes of one dtype, which is, or can be cast to, `dtype` on the way."""
    return (
        len({entry.torch_dtype for entry in entries}) == 1
        and kernels_cast(entries[0].torch_dtype, dtype)
        and all(is_plain(entry) for entry in entries)
    )


def _are_even(stacks: Sequence[Sequence[Entry]]) -> bool:
    """Whether each stack has as many entries, of one shape, and all but the rows of that is the same for all stacks."""
    shapes = [{entry.torch_shape for entry in stack} for stack in stacks]
    if any(len(shape) != 1 for shape in shapes) or len({len(stack) for stack in stacks}) != 1:
        return False
    (first, *others) = [next(iter(shape)) for shape in shapes]
    return len(first) > 0 and all(len(other) > 0 and other[1:] == first[1:] for other in others)


def _side_by_side(name: str, stacks: Sequence[Sequence[Entry]]) -> dict[str, Part]:
    """Stack by stack within each element of the new first dimension."""
    rows = [stack[0].torch_shape[0] for stack in stacks]
    row_elements = prod(stacks[0][0].torch_shape[1:])
    shape = (len(stacks[0]), sum(rows), *stacks[0][0].torch_shape[1:])
    parts: dict[str, Part] = {}
    for number, stack in enumerate(stacks):
        for index, entry in enumerate(stack):
            first_row = index * sum(rows) + sum(rows[:number])
            parts[entry.name] = Part(name, shape, first_row * row_elements)
    return parts
