"""Makes a model's modules agree with what the checkpoint has for them, before a byte of a tensor is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from torch import nn

from pyint8.checkpoint import Checkpoint
from pyint8.errors import first_names
from pyint8.models import checks
from pyint8.models.assembly import Stored
from pyint8.quantizer import Int8Quantizer

TIED = "its weight is tied to another"
ABSENT = "its weight is not in the checkpoint"

Found = Stored | str | None
"""What the checkpoint has for a weight: a `Stored`, the reason why its module stays ordinary, or None if a conversion
makes it."""

logger = logging.getLogger(__name__)

_NAMED_AT_MOST = 5


def reconcile_modules(
    model: nn.Module,
    quantizer: Int8Quantizer,
    find: Callable[[str], Found],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[str]:
    """Puts back the replaced modules whose weight is absent, tied, misshapen, or a float in an int8 checkpoint.

    Args:
        model: Changed in place.
        quantizer: Puts modules back, and keeps the reasons.
        find: What the checkpoint has for a weight, by its name in the model.
        shapes: The parameters' shapes by name, if a wrong shape is a reason to put a module back.

    Returns:
        The modules whose weight is absent.
    """
    absent = []
    for name in list(quantizer.converted):
        weight = f"{name}.weight"
        reason = _why_ordinary(weight, find(weight), quantizer, shapes)
        if reason is not None:
            quantizer.put_back(model, name, reason)
        if reason == ABSENT:
            absent.append(name)
    return absent


def _why_ordinary(
    weight: str, found: Found, quantizer: Int8Quantizer, shapes: Mapping[str, tuple[int, ...]] | None
) -> str | None:
    if not isinstance(found, Stored):
        return found
    if quantizer.pre_quantized and found.scales is None and found.entry.is_floating:
        return "it is not quantized in the checkpoint"
    if shapes is not None and found.entry.torch_shape != quantizer.expected_shape(weight, shapes[weight]):
        return "its weight in the checkpoint has another shape"
    return None


def check_absent(
    checkpoint: Checkpoint, quantizer: Int8Quantizer, body: Collection[str], absent: list[str], wanted: Collection[str]
) -> None:
    """Warns of modules that stay ordinary because their weight is absent; refuses if all of the body's are.

    Args:
        checkpoint: For the error.
        quantizer: Is told that they have been named.
        body: The replaced modules, without those of the head.
        absent: All replaced modules whose weight is absent.
        wanted: Names of the model's parameters, for the error.

    Raises:
        CheckpointError: The checkpoint has none of the body's weights to quantize (`strict` only).
    """
    if quantizer.strict and body and set(body) <= set(absent):
        checks.refuse_unrelated(checkpoint, wanted)
    quantizer.acknowledged.update(absent)
    if absent:
        logger.warning(
            "%d linear modules are not in the checkpoint, so initialized afresh, not quantized: %s; train before use",
            len(absent),
            first_names(absent, _NAMED_AT_MOST),
        )


def check_stored(
    name: str,
    stored: Stored,
    shape: tuple[int, ...],
    quantizer: Int8Quantizer,
    *,
    allow_mismatched_shapes: bool = False,
) -> None:
    """Refuses what cannot become a parameter or buffer, of `shape` in the model.

    Raises:
        ShapeMismatchError: Its shape is not `shape` (left to transformers if that is allowed).
        QuantizationStateError: int8 codes for a module that is not quantized here, or without sound scales.
        CheckpointError: A weight to be quantized is not of a floating dtype.
    """
    entry, scales = stored.entry, stored.scales
    if quantizer.takes_codes(name, scales is not None):
        if quantizer.pre_quantized:
            checks.require_scales(scales, entry)
        else:
            checks.require_real_floats(entry)
        checks.require_shape(entry, name, quantizer.expected_shape(name, shape))
        return
    if scales is None and quantizer.quantizes_experts(name):
        checks.require_real_floats(entry)
        checks.require_shape(entry, name, quantizer.expected_shape(name, shape))
        return
    if scales is not None and quantizer.check_experts_param(name):
        checks.require_shape(entry, name, shape)
        checks.require_shape(scales, name, shape[:-1])
        return
    if allow_mismatched_shapes and entry.torch_shape != shape:
        return  # transformers initializes it afresh
    if scales is not None:
        module = name.rpartition(".")[0]
        checks.refuse_codes(entry, name, quantizer.skipped.get(module, "it is no linear module"))
    checks.require_shape(entry, name, shape)
