"""What stays in 16 or 32 bit beside the int8 weights of a loaded model, with its size and the reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pyint8.quantizer import Int8Quantizer, modules_to_keep, why_not_experts
from pyint8.report import LoadReport, readable_size

logger = logging.getLogger(__name__)

_EMBEDDING = "an embedding"
_EXPERTS = "fused experts"
_CAN_BE_INT8 = f"{_EXPERTS}, which pyint8.Int8Config(experts=True) quantizes"
# A parameter with so many elements is listed even if every quantized weight is larger.
_LARGE = 1 << 16
# The fraction of a model's bytes that may stay unquantized without a warning.
_TOLERATED = 0.1


@dataclass(frozen=True)
class _Parameter:
    """A parameter that is not int8.

    Attributes:
        name: The module's, if it is its `weight`, else the parameter's own.
        reason: Why it is not.
        elements: How many it has; 0 if it is no matrix (or more), so no weight.
        nbytes: What it takes.
        expected: Whether it is usually not int8 (an embedding, the output head), or was left out knowingly.
    """

    name: str
    reason: str
    elements: int
    nbytes: int
    expected: bool


def report_unquantized(model: nn.Module, quantizer: Int8Quantizer, report: LoadReport) -> None:
    """Fills the report's `skipped` and `skipped_bytes`; warns if more than a tenth stays unquantized unexpectedly.

    Listed are all linear modules that were not converted, and every other floating parameter of a weight's size: with
    two dimensions or more, and as large as the smallest weight that was quantized.
    """
    quantized = [
        parameter
        for name, parameter in model.named_parameters()
        if quantizer.check_quantized_param(name) or quantizer.check_experts_param(name)
    ]
    worth_listing = min([_LARGE, *(parameter.numel() for parameter in quantized)])
    report.skipped = dict(quantizer.skipped)
    report.skipped_bytes = dict.fromkeys(report.skipped, 0)
    others = list(_others(model, quantizer))
    for other in others:
        if other.name in report.skipped or other.elements >= worth_listing:
            report.skipped.setdefault(other.name, other.reason)
            report.skipped_bytes[other.name] = other.nbytes
    if quantized:  # otherwise a warning was logged already
        _warn_if_much(type(model).__name__, sum(parameter.nbytes for parameter in quantized), others)


def _others(model: nn.Module, quantizer: Int8Quantizer) -> Iterator[_Parameter]:
    """Floating parameters that are not a converted module's weight, each once however many names it has."""
    modules = dict(model.named_modules())
    heads = {*modules_to_keep(model), *_output_embeddings(model, modules)}
    for full_name, parameter in model.named_parameters():
        if quantizer.check_quantized_param(full_name) or not parameter.is_floating_point():
            continue
        owner, _, leaf = full_name.rpartition(".")
        reason = quantizer.skipped.get(owner) or _why(modules[owner], full_name)
        yield _Parameter(
            name=owner if leaf == "weight" else full_name,
            reason=reason,
            elements=parameter.numel() if sum(size > 1 for size in parameter.shape) > 1 else 0,
            nbytes=parameter.nbytes,
            expected=owner in heads or owner in quantizer.acknowledged or reason == _EMBEDDING,
        )


def _output_embeddings(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    find = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    return [name for name, module in modules.items() if module is head]


def _why(module: nn.Module, parameter_name: str) -> str:
    """Why a parameter that is no linear module's weight is not int8."""
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _EMBEDDING
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if isinstance(module, nn.MultiheadAttention):
        return "torch's attention keeps query, key and value in one parameter"
    if "expert" in f"{parameter_name} {kind}".lower():
        why_not = why_not_experts(module)
        return _CAN_BE_INT8 if why_not is None else f"{_EXPERTS}: {why_not or 'one parameter holds the weights of all'}"
    if "embed" in parameter_name.rpartition(".")[2]:
        return _EMBEDDING
    return f"a parameter of {kind}, which is no linear module"


def _warn_if_much(model: str, int8_bytes: int, others: list[_Parameter]) -> None:
    left: Counter[str] = Counter()
    for other in others:
        if other.elements and not other.expected:
            left[other.reason] += other.nbytes
    total = int8_bytes + sum(other.nbytes for other in others if not other.expected)
    if left.total() <= _TOLERATED * total:
        return
    reason, most = left.most_common(1)[0]
    example = max((other for other in others if other.reason == reason), key=lambda other: other.nbytes)
    if reason == _CAN_BE_INT8:
        reason += f" (and saves {readable_size(most // 2)})"
    logger.warning(
        "%s of this %s's %s, output head and embeddings aside, are not int8; most of that, %s: %s, such as %s (all are "
        "in LoadReport.skipped)",
        readable_size(left.total()),
        model,
        readable_size(total),
        readable_size(most),
        reason,
        example.name,
    )
