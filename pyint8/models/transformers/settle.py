"""What the plan says about modules and shapes, before a byte is read."""

from __future__ import annotations

from typing import Any

from pyint8.checkpoint import Checkpoint
from pyint8.errors import QuantizationStateError, ShapeMismatchError
from pyint8.models.transformers.plan import LoadPlan, Target, entry_of
from pyint8.quantizer import Int8Quantizer


def settle_modules(
    plan: LoadPlan, model: Any, checkpoint: Checkpoint, quantizer: Int8Quantizer, *, allow_mismatched_shapes: bool
) -> None:
    """Puts back the replaced modules whose weight is absent, not int8 in a pre-quantized checkpoint, or misshapen."""

    def why_ordinary(target: Target, name: str) -> str | None:
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
        target = made_by.get(f"{name}.weight")
        if target is None:
            quantizer.keep_unquantized(model, name, "its weight is not in the checkpoint")
            absent.append(name)
        elif (reason := why_ordinary(target, f"{name}.weight")) is not None:
            quantizer.keep_unquantized(model, name, reason)
    quantizer.name_absent(absent)


def check_tensors(
    plan: LoadPlan, model: Any, checkpoint: Checkpoint, quantizer: Int8Quantizer, *, allow_mismatched_shapes: bool
) -> None:
    """Refuses tensors that cannot become their parameters.

    Raises:
        ShapeMismatchError: A tensor's shape is not its parameter's (left to transformers if that is allowed).
        QuantizationStateError: int8 codes for a module that is not quantized here, or scales without a weight.
    """
    parameters = model.state_dict()
    for name, target in plan.targets.items():
        entry = entry_of(target, checkpoint)
        quantized = quantizer.check_quantized_param(name)
        if entry is None:
            _require_weight(target, checkpoint)
            continue
        if target.scales is not None and not quantized:
            reason = quantizer.skipped.get(name.rpartition(".")[0], "it is no linear module")
            raise QuantizationStateError(
                f"int8 codes for {name}, whose module is not quantized here: {reason}", **entry.place
            )
        expected = quantizer.expected_shape(model, name) if quantized else tuple(parameters[name].shape)
        if entry.torch_shape != expected and not allow_mismatched_shapes:
            raise ShapeMismatchError(
                f"its shape is {list(entry.shape)}, and {name} needs {list(expected)}; is this the checkpoint of this "
                "configuration? (ignore_mismatched_sizes=True initializes such parameters afresh)",
                **entry.place,
            )


def _require_weight(target: Target, checkpoint: Checkpoint) -> None:
    companion = target.scales or target.format
    if companion is not None and not target.sources:
        raise QuantizationStateError(
            f"it belongs to {target.name}, which the checkpoint does not have; save the quantized model again",
            **checkpoint[companion].place,
        )
