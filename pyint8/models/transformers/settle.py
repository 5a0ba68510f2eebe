"""What the plan says about modules and shapes, before a byte is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.errors import CheckpointError, ShapeMismatchError
from pyint8.models import checks
from pyint8.models.transformers.plan import LoadPlan, Target, entry_of
from pyint8.quantizer import Int8Quantizer

_TIED = "its weight is tied to another"
_ABSENT = "its weight is not in the checkpoint"


def settle_modules(
    plan: LoadPlan,
    model: Any,
    parameters: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    quantizer: Int8Quantizer,
    *,
    allow_mismatched_shapes: bool,
) -> bool:
    """Puts back the replaced modules whose weight is absent, tied, misshapen, or a float in an int8 checkpoint.

    Args:
        plan: Every tensor's place.
        model: Changed in place.
        parameters: Its state dict, on meta.
        checkpoint: What there is.
        quantizer: Told of what is put back.
        allow_mismatched_shapes: Whether a wrong shape is a reason; else `check_tensors` refuses it.

    Returns:
        Whether there were any, so that the model has another state dict now.
    """

    def why_ordinary(target: Target | None, name: str) -> str | None:
        if target is None:
            return _TIED if name in model.all_tied_weights_keys else _ABSENT
        entry = entry_of(target, checkpoint)
        if entry is None:
            return None
        if quantizer.pre_quantized and target.scales is None and entry.is_floating:
            return "it is not quantized in the checkpoint"
        if allow_mismatched_shapes and entry.torch_shape != quantizer.expected_shape(name, parameters[name].shape):
            return "its weight in the checkpoint has another shape"
        return None

    made_by = plan.made_by()
    replaced = list(quantizer.converted)
    absent = []
    for name in replaced:
        weight = f"{name}.weight"
        reason = why_ordinary(made_by.get(weight), weight)
        if reason is not None:
            quantizer.keep_unquantized(model, name, reason)
        if reason == _ABSENT:
            absent.append(name)
    quantizer.name_absent(absent)
    return len(quantizer.converted) < len(replaced)


def check_tensors(
    plan: LoadPlan,
    parameters: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    quantizer: Int8Quantizer,
    *,
    allow_mismatched_shapes: bool,
) -> None:
    """Refuses tensors that cannot become their parameters, which are those of the model's state dict.

    Raises:
        ShapeMismatchError: A tensor's shape is not its parameter's (left to transformers if that is allowed).
        QuantizationStateError: int8 codes for a module that is not quantized here, or without sound scales.
        CheckpointError: A weight to be quantized is not of a floating dtype, or experts are missing.
    """
    for name, target in plan.targets.items():
        dequantized = target.scales is not None and quantizer.dequantizes(name)
        entry = entry_of(target, checkpoint)
        if entry is None:
            _check_sources(target, parameters[name].shape, checkpoint, allow_mismatched_shapes=allow_mismatched_shapes)
            continue
        if not quantizer.check_quantized_param(name) and not dequantized:
            if allow_mismatched_shapes and entry.torch_shape != tuple(parameters[name].shape):
                continue  # transformers initializes it afresh
            if target.scales is not None:
                module = name.rpartition(".")[0]
                checks.refuse_codes(entry, name, quantizer.skipped.get(module, "it is no linear module"))
            checks.require_shape(entry, name, tuple(parameters[name].shape))
            continue
        expected = quantizer.expected_shape(name, parameters[name].shape)
        checks.require_int8_weight(
            checkpoint, entry, name, expected, scales=target.scales, pre_quantized=quantizer.pre_quantized
        )


def _check_sources(target: Target, shape: torch.Size, checkpoint: Checkpoint, *, allow_mismatched_shapes: bool) -> None:
    """Of what a converter makes a parameter of `shape`."""
    companion = target.scales or target.format
    if companion is not None and not target.sources:
        checks.refuse_orphan(checkpoint[companion], target.name)
    if not target.stacks:
        return
    kinds: dict[str | None, list[Entry]] = {}
    for name, pattern in target.sources:
        kinds.setdefault(pattern, []).append(checkpoint[name])
    for pattern, entries in kinds.items():  # experts: as many of each kind, and of one shape
        if len(entries) != shape[0] and not allow_mismatched_shapes:
            raise CheckpointError(
                f"{target.name} is merged of {shape[0]} tensors named {pattern}, and the checkpoint has "
                f"{len(entries)}; is it whole, and of this configuration?",
                tensor=entries[0].name,
                path=entries[0].path,
            )
        usual = Counter(entry.torch_shape for entry in entries).most_common(1)[0][0]
        for entry in entries:
            if entry.torch_shape != usual:
                raise ShapeMismatchError(
                    f"its shape is {list(entry.shape)}, and that of the others that {target.name} is merged of is "
                    f"{list(usual)}; download the checkpoint again",
                    **entry.place,
                )
