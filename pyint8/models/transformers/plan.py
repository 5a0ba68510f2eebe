"""Which checkpoint tensors make which parameters, by transformers' own renamings, before a byte is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint
from pyint8.models.assembly import Stored
from pyint8.models.checks import FORMAT, SCALES
from pyint8.models.transformers.compat import (
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)
from pyint8.models.transformers.renaming import Renamer, in_loading_order
from pyint8.quantizer import EXPERT_SCALES


@dataclass
class Target:
    """One step of transformers' loading loop.

    Attributes:
        name: The parameter or buffer it makes; the first, if one converter makes several.
        sources: Checkpoint names in the order they are collected, each with the converter's pattern that matched.
        converter: Makes the parameters from the sources; None if there is one source that needs no conversion.
        scales: The checkpoint's name of the `SCB` of a pre-quantized weight.
        scales_of: The same of each source that a converter merges, by that source's name.
        format: The checkpoint's name of its `weight_format`.
    """

    name: str
    sources: list[tuple[str, str | None]] = field(default_factory=list)
    converter: WeightConverter | None = None
    scales: str | None = None
    format: str | None = None
    scales_of: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str | None:
        """The one tensor that needs no conversion; None if there is a converter, or only scales."""
        return self.sources[0][0] if self.converter is None and self.sources else None

    def stored(self, checkpoint: Checkpoint) -> Stored | None:
        """What the checkpoint has for it; None if a converter makes it, or there are only scales."""
        if self.source is None:
            return None
        scales = None if self.scales is None else checkpoint[self.scales]
        layout = None if self.format is None else checkpoint[self.format]
        return Stored(checkpoint[self.source], scales, layout)

    @property
    def stacks(self) -> bool:
        """Whether its converter copies the sources into one tensor: a merge of experts."""
        operations = () if self.converter is None else self.converter.operations
        return any(isinstance(operation, MergeModulelist) for operation in operations)

    def makes(self) -> list[str]:
        """The names of all parameters it makes."""
        if self.converter is None:
            return [self.name]
        patterns = self.converter.target_patterns
        return [self.name.replace(patterns[0], pattern) for pattern in patterns]

    def source_names(self) -> list[str]:
        """Every checkpoint tensor it reads, in order: those of a conversion pattern by pattern."""
        by_pattern: dict[str | None, list[str]] = {}
        for name, pattern in self.sources:
            by_pattern.setdefault(pattern, []).append(name)
        extras = [name for name in (self.format, self.scales) if name is not None]
        extras += self.scales_of.values()
        return extras + [name for names in by_pattern.values() for name in names]


@dataclass
class LoadPlan:
    """What every checkpoint tensor is for.

    Attributes:
        targets: In the order of transformers' loop.
        renamed: For each checkpoint name, the result of transformers' renamings and converters. (transformers then adds
            or removes the base model's prefix itself.)
        further: The checkpoint's names of all but the first tensor of a target, where they are none of the model's.
        claimed: The values of `renamed` that lead to a target.
        also_unexpected: Names to report as unexpected that transformers would not find by itself.
        used: The renamings and converters that matched something, which saving must revert.
        absent: The targets of tensors that an index names, but no shard has.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    further: set[str] = field(default_factory=set)
    claimed: set[str] = field(default_factory=set)
    also_unexpected: set[str] = field(default_factory=set)
    used: list[WeightTransform] = field(default_factory=list)
    absent: dict[str, Target] = field(default_factory=dict)

    @cached_property
    def made_by(self) -> dict[str, Target]:
        """The target that makes each parameter, once the plan is complete."""
        return {name: target for target in self.targets.values() for name in target.makes()}


def plan_load(
    checkpoint: Checkpoint,
    conversions: list[WeightTransform],
    base_model_prefix: str,
    parameters: Mapping[str, Any],
    *,
    pre_quantized: bool,
) -> LoadPlan:
    """Plans the load of `checkpoint` into a model whose state dict has the keys `parameters`.

    The steps are those of transformers' `convert_and_load_state_dict_in_model`; the scales of pre-quantized weights,
    which transformers handles by a converter, are filed with their weight here.
    """
    plan = LoadPlan()
    names = Renamer(conversions, base_model_prefix, parameters)
    for key in in_loading_order(list(checkpoint)):
        weight, companion = _companion(key, checkpoint) if pre_quantized else (key, None)
        if pre_quantized and _is_of_experts(key, checkpoint, parameters):
            renamed, final, converter, pattern = key, key, None, None
        elif pre_quantized and key.endswith(EXPERT_SCALES):  # they go where their weight goes
            renamed, final, converter, pattern = names.resolve(key.removesuffix(EXPERT_SCALES))
            renamed, final = renamed + EXPERT_SCALES, final + EXPERT_SCALES
        else:
            renamed, final, converter, pattern = names.resolve(weight)
        plan.renamed[key] = renamed
        if final not in parameters:
            if converter is not None:
                patterns = converter.target_patterns
                plan.also_unexpected.update(final.replace(patterns[0], other) for other in patterns[1:])
            continue
        plan.claimed.add(renamed)
        target = plan.targets.get(final)
        if target is None:
            target = plan.targets[final] = Target(final)
        elif key not in parameters:
            plan.further.add(key)
        _filed(target, key, companion, converter, pattern)
    plan.used = [conversion for conversion in conversions if conversion.was_used()]
    for key in checkpoint.absent:
        weight, companion = _companion(key, checkpoint) if pre_quantized else (key, None)
        _, final, converter, pattern = names.resolve(weight)
        if final in parameters:
            plan.absent[key] = _filed(Target(final), key, companion, converter, pattern)
    return plan


def _filed(
    target: Target, key: str, companion: str | None, converter: WeightConverter | None, pattern: str | None
) -> Target:
    """Adds a tensor to the target, and returns it."""
    if companion == SCALES and converter is not None:
        target.scales_of[f"{key.removesuffix(SCALES)}weight"] = key
    elif companion == SCALES:
        target.scales = key
    elif companion == FORMAT:
        target.format = key
    else:
        target.sources.append((key, pattern))
        target.converter = converter
    return target


def _is_of_experts(key: str, checkpoint: Checkpoint, parameters: Mapping[str, Any]) -> bool:
    """Whether these are codes, or scales, of all experts of a module, which then have the model's own names."""
    own = parameters.get(key)
    is_codes = own is not None and checkpoint[key].dtype == "I8" and own.dtype == torch.int8 and own.ndim > 2
    return is_codes or (own is not None and key.endswith(EXPERT_SCALES))


def _companion(key: str, checkpoint: Iterable[str]) -> tuple[str, str | None]:
    """The weight that `key` belongs to, and as what: ("X.weight", "SCB") for "X.SCB"."""
    module, _, leaf = key.rpartition(".")
    return (f"{module}.weight", leaf) if leaf in (SCALES, FORMAT) else (key, None)
