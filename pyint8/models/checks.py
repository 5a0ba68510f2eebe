"""What a checkpoint's tensors must be like to become parameters, checked before a byte of them is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable
from enum import Enum, auto

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.checkpoint.entry import FORMAT as FORMAT
from pyint8.checkpoint.entry import SCALES as SCALES
from pyint8.errors import CheckpointError, QuantizationStateError, ShapeMismatchError
from pyint8.quantizer import EXPERT_WEIGHTS

logger = logging.getLogger(__name__)

_ROW_MAJOR = 0

_GO_ON_WITHOUT = "; or load without it, with strict=False (of pyint8.load, or of Int8Config)"
_TAKE_IT_ALL_THE_SAME = (
    "; or take it as it is, as transformers does, with strict=False (of pyint8.load, or of Int8Config)"
)


class Need(Enum):
    """Whether a load needs a tensor."""

    NONE = auto()
    WANTED = auto()
    REQUIRED = auto()


def check_disagreements(checkpoint: Checkpoint, want: Callable[[str], Need], *, strict: bool) -> None:
    """Refuses disagreements between an index and its shards that matter; logs one warning for the others.

    Args:
        checkpoint: Has the disagreements.
        want: Whether the load needs the tensor of this name.
        strict: Refuse disagreements about wanted tensors too, not only about required ones.

    Raises:
        CheckpointError: The load needs a tensor that no shard has, or that is not where the index says.
    """
    harmless = []
    for disagreement in checkpoint.disagreements:
        wanted = Need.NONE if disagreement.is_settled else want(disagreement.name)
        is_absent = disagreement.name not in checkpoint
        if is_absent and wanted is Need.REQUIRED:
            raise disagreement.error()
        if strict and wanted is not Need.NONE:
            raise disagreement.error(_GO_ON_WITHOUT if is_absent else _TAKE_IT_ALL_THE_SAME)
        harmless.append(disagreement)
    if harmless:
        others = f" The same is true of {len(harmless) - 1} others, such as {harmless[1].name}." if harmless[1:] else ""
        logger.warning("%s; it is loaded all the same.%s", harmless[0], others)


def require_shape(entry: Entry, name: str, expected: tuple[int, ...]) -> None:
    """Raises ShapeMismatchError unless the entry has the shape that parameter `name` needs."""
    if entry.torch_shape != expected:
        raise ShapeMismatchError(
            f"its shape is {list(entry.shape)}, and {name} needs {list(expected)}; is this the checkpoint of this "
            "configuration? (ignore_mismatched_sizes=True initializes such parameters of transformers models afresh)",
            **entry.location,
        )


def require_real_floats(entry: Entry) -> None:
    """Raises for a weight to be quantized that is not of a real floating dtype."""
    if entry.is_floating:
        return
    if entry.dtype == "I8":
        raise QuantizationStateError(
            "an int8 weight, and the checkpoint does not say how it was quantized (its scales, `SCB`, or the "
            "quantization_config of its config.json are missing); save the quantized model again",
            **entry.location,
        )
    raise CheckpointError(
        f"a weight of dtype {entry.dtype} cannot be quantized; leave its module out with "
        "config=Int8Config(skip_modules=[...])",
        **entry.location,
    )


def refuse_codes(entry: Entry, name: str, reason: str) -> None:
    """Raises for int8 codes whose module is not quantized here."""
    raise QuantizationStateError(
        f"int8 codes for {name}, whose module is not quantized here: {reason}", **entry.location
    )


def refuse_orphan(companion: Entry, name: str) -> None:
    """Raises for scales (or a format) whose weight is not in the checkpoint."""
    raise QuantizationStateError(
        f"it belongs to {name}, which the checkpoint does not have. Save the quantized model again; if that gives the "
        "same, transformers splits or fuses this weight when it saves, and only the 16-bit checkpoint can be loaded",
        **companion.location,
    )


def require_scales(scales: Entry | None, weight: Entry) -> None:
    """Raises unless a pre-quantized weight is int8 [out, in], and its scales are there, fp32 [out]."""
    if scales is None:
        raise QuantizationStateError(
            "an int8 weight without its scales (its `SCB` tensor); save the quantized model again", **weight.location
        )
    if weight.dtype != "I8":
        raise QuantizationStateError(
            f"scales (`SCB`) for a weight of dtype {weight.dtype}, which must be int8; save the quantized model again",
            **weight.location,
        )
    if scales.dtype != "F32" or scales.shape != weight.shape[:-1]:
        raise QuantizationStateError(
            f"its scales {scales.name} are {scales.dtype} {list(scales.shape)}; they must be F32 "
            f"{list(weight.shape[:-1])}",
            **weight.location,
        )


def require_row_major(layout: int, entry: Entry) -> None:
    """Raises unless an int8 weight's `weight_format` is the one that bitsandbytes still supports."""
    if layout != _ROW_MAJOR:
        raise QuantizationStateError(
            f"its weight_format is {layout}; only weights of format {_ROW_MAJOR} (row-major) can be loaded: save the "
            "model again with a recent bitsandbytes",
            **entry.location,
        )


def refuse_unrelated(checkpoint: Checkpoint, wanted: Collection[str]) -> None:
    """Raises CheckpointError for a checkpoint that has none of the weights to quantize, whose names are `wanted`."""
    stored, example = next(iter(checkpoint), "no tensor"), next(iter(wanted), "no parameter")
    problem = f"none of what the model wants (such as {example}) is in it, but others (such as {stored})"
    if (prefix := wrapper_prefix(checkpoint, wanted)) is not None:
        problem += (
            f": its names begin with {prefix!r}, as a wrapper (torch.compile, DistributedDataParallel, PEFT) saves "
            "them. Save the model that is inside the wrapper, or strip the prefix from the names and from the index"
        )
    elif (prefix := wrapper_prefix(wanted, checkpoint)) is not None:
        problem += f": the model's own names begin with {prefix!r}; fill what is inside this wrapper"
    else:
        problem += "; is it the checkpoint of this model?"
    raise CheckpointError(problem, path=checkpoint.files[0])


def wrapper_prefix(names: Iterable[str], bare: Container[str]) -> str | None:
    """The prefix of names of `bare` in most of `names`, such as "_orig_mod."; None if there is none."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        at = next((at for at in range(1, len(parts)) if ".".join(parts[at:]) in bare), None)
        if at is not None:
            found[".".join(parts[:at]) + "."] += 1
    return found.most_common(1)[0][0] if found else None


def has_expert_codes(checkpoint: Checkpoint) -> bool:
    """Whether experts are int8 in a checkpoint: each with its scales, as transformers 4 saved them, or all in one."""
    return has_fused_experts(checkpoint) or any(name.endswith(SCALES) and ".experts." in name for name in checkpoint)


def has_whole_experts(checkpoint: Checkpoint) -> bool:
    """Whether weights of experts, of any dtype, are one tensor for all of a module, by their names in transformers."""
    return any(name.rpartition(".")[2] in EXPERT_WEIGHTS for name in checkpoint)


def has_fused_experts(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has the scales of int8 experts, and so their codes, in one tensor for all of a module."""
    # of one weight they are a vector
    return any(name.endswith(SCALES) and len(entry.shape) == 2 for name, entry in checkpoint.items())
