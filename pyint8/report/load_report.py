"""What a load did: bytes, seconds, memory, and what stayed unquantized and why."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pyint8.errors import first_names
from pyint8.report.timeline import Timeline

_GB = 1e9
_PHASES = ("read headers", "build", "stream", "finish")


class Tally(dict[str, int]):
    """Numbers by kind; 0 for an absent kind. (A Counter does not survive `dataclasses.asdict`.)"""

    def __missing__(self, kind: str) -> int:
        return 0

    def most_common(self) -> list[tuple[str, int]]:
        """Largest first; equal ones in the order they came."""
        return sorted(self.items(), key=lambda item: -item[1])


@dataclass
class LoadReport:
    """Returned by `pyint8.load(..., return_report=True)`.

    It is returned beside the model, not set on it: a loaded model carries nothing of pyint8, so that copying,
    pickling and saving it is what it would be without.

    Attributes:
        checkpoint_bytes: Bytes of tensors that were read from the checkpoint and delivered to a device.
        seconds: Wall seconds by phase: "read headers", "build" (the model on meta, and the plan), "stream" (from
            the plan to the last parameter set; the first bytes may have been asked for before) and "finish".
        tensors: Number of parameters and buffers by what became of them: "int8" (quantized here), "pre-quantized",
            "dequantized" (int8 codes of a module that stays ordinary), "cast" (to another dtype), "as stored",
            "converted" (split or fused; renaming alone does not count), "left on disk" (read by accelerate whenever a
            forward pass needs them).
        quantized_by: Number of weights by what quantized them: "cint8_vector_quant", bitsandbytes' C function, called
            as the bytes of a band arrive on their GPU; or its Python operator "int8_vectorwise_quant", elsewhere.
        skipped: Everything of a weight's size that is not int8, with the reason: linear modules by name, and other
            parameters (embeddings, convolutions, fused experts) by their module's name, or their own if that is not
            `weight`.
        skipped_bytes: What each of these takes; 0 for one that shares the memory of another (a tied head).
        device_peak_bytes: For each CUDA device, the most memory that torch had allocated during the load.
        host_peak_bytes: Growth of this process's peak resident memory during the load, and of its pinned memory.
        from_cache: Whether the int8 form was read from the cache (see `pyint8.load`).
        engine: What the workers did: bytes_read, bytes_delivered, bytes_detoured (of those,
            over the buses of `borrow_gpus`), pieces, read_seconds, slot_seconds (sums).
        loading_info: As transformers' `output_loading_info`: missing, unexpected and mismatched keys.
        timeline: What was done when, with `StreamOptions(timeline=True)`; None without.
    """

    checkpoint_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0.0))
    tensors: Tally = field(default_factory=Tally)
    quantized_by: Tally = field(default_factory=Tally)
    skipped: dict[str, str] = field(default_factory=dict)
    skipped_bytes: dict[str, int] = field(default_factory=dict)
    device_peak_bytes: dict[str, int] = field(default_factory=dict)
    host_peak_bytes: int = 0
    from_cache: bool = False
    engine: dict[str, float] = field(default_factory=dict)
    loading_info: dict[str, Any] = field(default_factory=dict)
    timeline: Timeline | None = None

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def gigabytes_per_second(self) -> float:
        """Checkpoint bytes over all seconds of the load, in 1e9 bytes per second."""
        seconds = self.total_seconds
        return self.checkpoint_bytes / _GB / seconds if seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, the two properties included, as JSON has it: dicts, lists (sets are sorted), strings, numbers."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {"total_seconds": self.total_seconds, "gigabytes_per_second": self.gigabytes_per_second}
        plain: dict[str, Any] = _as_json(values)
        return plain

    def summary(self) -> str:
        """One line: bytes, seconds, speed, tensors by kind."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.tensors.most_common())
        speed = f"{self.gigabytes_per_second:.1f} GB/s"
        return f"{self.checkpoint_bytes / _GB:.3f} GB in {self.total_seconds:.2f} s ({speed}); tensors: {kinds}"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.tensors.most_common())
        lines = [
            f"read        {self.checkpoint_bytes / _GB:.3f} GB at {self.gigabytes_per_second:.2f} GB/s",
            f"seconds     {self.total_seconds:.2f} ({phases})",
            f"tensors     {kinds}",
            f"host peak   +{self.host_peak_bytes / _GB:.3f} GB",
        ]
        lines += [f"{name:<11} peak {peak / _GB:.3f} GB" for name, peak in self.device_peak_bytes.items()]
        if self.skipped:
            lines.append(f"not int8    {readable_size(sum(self.skipped_bytes.values()))}")
            lines += skipped_by_reason(self.skipped, self.skipped_bytes)
        return "\n".join(lines)


def skipped_by_reason(skipped: Mapping[str, str], skipped_bytes: Mapping[str, int]) -> list[str]:
    """A line for each reason why something is not int8, the largest first."""
    names: dict[str, list[str]] = {}
    nbytes: Counter[str] = Counter()
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
        nbytes[reason] += skipped_bytes.get(name, 0)
    return [
        f"  {readable_size(size):<9} {reason}: {first_names(names[reason])}" for reason, size in nbytes.most_common()
    ]


def readable_size(nbytes: int) -> str:
    """In the largest unit of 1000 that leaves a number of at least 1: "1.05 GB", "66 kB"."""
    for unit, size, digits in (("GB", 10**9, 2), ("MB", 10**6, 1), ("kB", 10**3, 0)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes} B"


def _as_json(value: Any) -> Any:
    if isinstance(value, Timeline):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_as_json(each) for each in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
