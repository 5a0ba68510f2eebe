"""What the plan says about modules and shapes, before a byte is read."""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import MergeModulelist

from pyint8.checkpoint import Checkpoint
from pyint8.models import checks
from pyint8.models.transformers.plan import LoadPlan, Target, entry_of
from pyint8.quantizer import Int8Quantizer

_TIED = "its weight is tied to another"
_ABSENT = "its weight is not in the checkpoint"


def settle_modules(
    plan: LoadPlan, model: Any, checkpoint: Checkpoint, quantizer: Int8Quantizer, *, allow_mismatched_shapes: bool
) -> None:
    """Puts back the replaced modules whose weight is absent, tied, misshapen, or a float in an int8 checkpoint."""

    def why_ordinary(target: Target | None, name: str) -> str | None:
        if target is None:
            return _TIED if name in model.all_tied_weights_keys else _ABSENT
        entry = entry_of(target, checkpoint)
        if entry is None:
            return None
        if quantizer.pre_quantized and target.scales is None and entry.is_floating:
            return "it is not quantized in the checkpoint"
        if allow_mismatched_shapes and entry.torch_shape != quantizer.expected_shape(model, name):
            return "its weight in the checkpoint has another shape"
        return None

    made_by = plan.made_by()
    absent = []
    for name in list(quantizer.converted):
        weight = f"{name}.weight"
        reason = why_ordinary(made_by.get(weight), weight)
        if reason is not None:
            quantizer.keep_unquantized(model, name, reason)
        if reason == _ABSENT:
            absent.append(name)
    quantizer.name_absent(absent)


def check_tensors(
    plan: LoadPlan, model: Any, checkpoint: Checkpoint, quantizer: Int8Quantizer, *, allow_mismatched_shapes: bool
) -> None:
    """Refuses tensors that cannot become their parameters.

    Raises:
        ShapeMismatchError: A tensor's shape is not its parameter's (left to transformers if that is allowed).
        QuantizationStateError: int8 codes for a module that is not quantized here, or without sound scales.
        CheckpointError: A weight to be quantized is not of a floating dtype.
    """
    parameters = model.state_dict()
    for name, target in plan.targets.items():
        quantized = quantizer.check_quantized_param(name)
        entry = entry_of(target, checkpoint)
        if entry is None:
            _check_sources(target, checkpoint)
            continue
        if not quantized:
            if allow_mismatched_shapes and entry.torch_shape != tuple(parameters[name].shape):
                continue  # transformers initializes it afresh
            if target.scales is not None:
                module = name.rpartition(".")[0]
                checks.refuse_codes(entry, name, quantizer.skipped.get(module, "it is no linear module"))
            checks.require_shape(entry, name, tuple(parameters[name].shape))
            continue
        expected = quantizer.expected_shape(model, name)
        checks.require_int8_weight(
            checkpoint, entry, name, expected, scales=target.scales, pre_quantized=quantizer.pre_quantized
        )


def _check_sources(target: Target, checkpoint: Checkpoint) -> None:
    companion = target.scales or target.format
    if companion is not None and not target.sources:
        checks.refuse_orphan(checkpoint[companion], target.name)
    operations = getattr(target.converter, "operations", ())
    if not any(isinstance(operation, MergeModulelist) for operation in operations):
        return
    first: dict[str | None, tuple[int, ...]] = {}
    for name, pattern in target.sources:  # they are stacked: experts of one shape
        entry = checkpoint[name]
        checks.require_shape(entry, target.name, first.setdefault(pattern, entry.torch_shape))
