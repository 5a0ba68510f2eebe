"""Whether a checkpoint has what int8 experts are made of: all of it 16 or 32 bit, or codes with sound scales.

Those of an int8 checkpoint lie in one of two ways, which their names and shapes tell apart: each expert by itself, as
transformers 4 saved them (`X.experts.0.w1.weight`, int8 [out, in], and `X.experts.0.w1.SCB`, fp32 [out]), or those of a
module whole (`X.experts.down_proj`, int8 [experts, out, in], and `X.experts.down_proj_SCB`, fp32 [experts, out]).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.errors import CheckpointError, ModelNotSupportedError, QuantizationStateError
from pyint8.models import checks
from pyint8.models.transformers.compat import experts_implementation
from pyint8.models.transformers.plan import LoadPlan, Target
from pyint8.quantizer import EXPERT_SCALES, Int8Quantizer

EXPERTS = "pyint8-1"
"""What a saved model with int8 experts names as its implementation of them (see docs/recipes.md): transformers without
pyint8, which would take the codes for weights, refuses a name that it does not know. The number is that of what codes
and scales mean; another one is refused."""


def refuse_other_forms(config: Any, path: str) -> None:
    """Raises ModelNotSupportedError for a configuration that another version of pyint8 saved, with other experts."""
    named = experts_implementation(config)
    if isinstance(named, str) and named.startswith(EXPERTS.rstrip("0123456789")) and named != EXPERTS:
        raise ModelNotSupportedError(
            f"the int8 experts in {path} are of the form {named}, and this pyint8 reads {EXPERTS}: install the release "
            "of pyint8 that wrote it, or a later one, or start from the 16-bit checkpoint"
        )


def check_experts(
    plan: LoadPlan, parameters: Mapping[str, torch.Tensor], checkpoint: Checkpoint, quantizer: Int8Quantizer
) -> None:
    """Refuses experts that are missing, and codes without scales, or where there should be none.

    Raises:
        CheckpointError: The checkpoint has none of the weights of a module of experts.
        QuantizationStateError: Codes and scales do not belong together, or some experts alone are int8.
    """
    made_by = plan.made_by
    for name in filter(quantizer.check_experts_param, parameters):
        if name not in made_by:
            raise CheckpointError(
                f"it has no {name}, and experts that become int8 cannot be initialized afresh; is it whole, and of "
                "this configuration? Int8Config(experts=False) leaves them to transformers",
                path=checkpoint.files[0],
            )
        entries = [checkpoint[source] for source, _ in made_by[name].sources]
        if quantizer.pre_quantized:
            whole = made_by.get(name + EXPERT_SCALES)
            _check_codes(made_by[name], entries, whole, tuple(parameters[name].shape), checkpoint)
        else:
            _refuse_codes(entries)


def _check_codes(
    target: Target, entries: list[Entry], whole: Target | None, shape: tuple[int, ...], checkpoint: Checkpoint
) -> None:
    for entry in entries:
        if entry.dtype != "I8":
            raise QuantizationStateError(
                f"it is {entry.dtype}, and other experts of the checkpoint are int8; if that is meant, name the "
                f"model's module, {target.name.rpartition('.')[0]}, in llm_int8_skip_modules of config.json",
                **entry.location,
            )
        own = target.scales_of.get(entry.name, target.scales)
        if own is not None or whole is None or whole.source is None:
            checks.require_scales(None if own is None else checkpoint[own], entry)
    if whole is not None and whole.source is not None:
        scales = checkpoint[whole.source]
        if scales.dtype != "F32" or scales.torch_shape != shape[:-1]:
            raise QuantizationStateError(
                f"these scales of {target.name} are {scales.dtype} {list(scales.shape)}; they must be F32 "
                f"{list(shape[:-1])}",
                **scales.location,
            )


def _refuse_codes(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.dtype == "I8":
            raise QuantizationStateError(
                "it is int8, and nothing says that the checkpoint is (no quantization_config in its config.json)",
                **entry.location,
            )
