"""Checks a plan against modules and shapes before a byte is read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.errors import CheckpointError, ShapeMismatchError
from pyint8.models import checks
from pyint8.models.assembly import Stored
from pyint8.models.reconcile import ABSENT, TIED, check_absent, check_stored, reconcile_modules
from pyint8.models.transformers.compat import may_be_missing, tied_weights
from pyint8.models.transformers.expert_codes import check_experts
from pyint8.models.transformers.plan import LoadPlan, Target
from pyint8.quantizer import Int8Quantizer


def check_index(
    plan: LoadPlan, model: Any, checkpoint: Checkpoint, *, strict: bool, allow_mismatched_shapes: bool
) -> None:
    """Refuses disagreements of an index and its shards, or warns of them (see `checks.check_disagreements`)."""
    if not checkpoint.disagreements:
        return
    used = {name for target in plan.targets.values() for name in target.source_names()}

    def want(name: str) -> checks.Need:
        if name not in plan.absent:
            return checks.Need.WANTED if name in used else checks.Need.NONE
        target = plan.absent[name]
        if target.format is not None or (target.source is not None and _is_covered_otherwise(target.name, plan, model)):
            return checks.Need.NONE
        others = plan.targets.get(target.name)  # the target that it is a part, or the scales, of
        if others is None or target.source is not None or (target.scales is None and allow_mismatched_shapes):
            return checks.Need.WANTED
        return checks.Need.REQUIRED

    checks.check_disagreements(checkpoint, want, strict=strict)


def _is_covered_otherwise(name: str, plan: LoadPlan, model: Any) -> bool:
    """Whether a parameter is made from another tensor, tied to such a one, or dispensable for its model."""
    ties = tied_weights(model)
    source = ties.get(name, name)
    group = {source, *(tied for tied, other in ties.items() if other == source)}
    return may_be_missing(model, name) or not group.isdisjoint(plan.made_by)


def reconcile(
    plan: LoadPlan,
    model: Any,
    checkpoint: Checkpoint,
    quantizer: Int8Quantizer,
    *,
    allow_mismatched_shapes: bool,
) -> dict[str, torch.Tensor]:
    """Puts modules back whose weight is absent or unsuitable, then refuses tensors that cannot become parameters.

    Args:
        plan: What every tensor is for.
        model: On meta; changed in place.
        checkpoint: What it has.
        quantizer: Puts modules back, and keeps the reasons.
        allow_mismatched_shapes: Whether a wrong shape is left to transformers, or refused.

    Returns:
        The model's state dict after that.

    Raises:
        CheckpointError: The checkpoint has none of the model's weights to quantize (`strict` only), experts are
            missing, or a weight to be quantized is not of a floating dtype.
        ShapeMismatchError: A tensor's shape is not its parameter's.
        QuantizationStateError: int8 codes for a module that is not quantized here, or without sound scales.
    """
    parameters: dict[str, torch.Tensor] = model.state_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    made_by = plan.made_by

    def find(weight: str) -> Stored | str | None:
        if weight not in made_by:
            return TIED if weight in tied_weights(model) else ABSENT
        return made_by[weight].stored(checkpoint)

    if quantizer.strict and not plan.targets:
        checks.refuse_unrelated(checkpoint, parameters)
    replaced = list(quantizer.converted)
    absent = reconcile_modules(model, quantizer, find, shapes if allow_mismatched_shapes else None)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    body = [name for name in replaced if name.startswith(prefix)]
    check_absent(checkpoint, quantizer, body, absent, parameters)
    if len(quantizer.converted) < len(replaced):
        parameters = model.state_dict()
    check_experts(plan, parameters, checkpoint, quantizer)
    for name, target in plan.targets.items():
        _check_target(name, target, tuple(parameters[name].shape), checkpoint, quantizer, allow_mismatched_shapes)
    return parameters


def _check_target(
    name: str,
    target: Target,
    shape: tuple[int, ...],
    checkpoint: Checkpoint,
    quantizer: Int8Quantizer,
    allow_mismatched_shapes: bool,
) -> None:
    stored = target.stored(checkpoint)
    if stored is None:
        _check_sources(target, shape, checkpoint, allow_mismatched_shapes=allow_mismatched_shapes)
    else:
        check_stored(name, stored, shape, quantizer, allow_mismatched_shapes=allow_mismatched_shapes)


def _check_sources(
    target: Target, shape: tuple[int, ...], checkpoint: Checkpoint, *, allow_mismatched_shapes: bool
) -> None:
    """Checks the sources of a converter that makes a parameter of `shape`."""
    companion = target.scales or target.format
    if companion is not None and not target.sources:
        checks.refuse_orphan(checkpoint[companion], target.name)
    if not target.stacks:
        return
    kinds: dict[str | None, list[Entry]] = {}
    for name, pattern in target.sources:
        kinds.setdefault(pattern, []).append(checkpoint[name])
    for pattern, entries in kinds.items():  # experts: as many of each kind as the parameter has, all of one shape
        if len(entries) != shape[0] and not allow_mismatched_shapes:
            raise CheckpointError(
                f"{target.name} is merged of {shape[0]} tensors named {pattern}, and the checkpoint has "
                f"{len(entries)}; is it whole, and of this configuration?",
                tensor=entries[0].name,
                path=entries[0].path,
            )
        shapes = Counter(entry.torch_shape for entry in entries)
        if len(shapes) == 1:
            continue
        usual = shapes.most_common(1)[0][0]
        for entry in entries:
            if entry.torch_shape != usual:
                raise ShapeMismatchError(
                    f"its shape is {list(entry.shape)}, and that of the others that {target.name} is merged of is "
                    f"{list(usual)}; download the checkpoint again",
                    **entry.location,
                )
