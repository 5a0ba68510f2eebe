"""What a load is about to do, in a few words that ranks can compare."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyint8.checkpoint.identity import sample_of
from pyint8.errors import RankError
from pyint8.host.imports import imported
from pyint8.remote.objects import state_of
from pyint8.streaming.extension import _core

if TYPE_CHECKING:
    from pyint8.streaming.requests import TensorRequest


def fingerprint(
    requests: Sequence[TensorRequest], early: Iterable[str], facts: Sequence[Any], *, checksums: bool
) -> dict[str, str]:
    """Everything that the order and the sizes of what is gathered depend on, and by which people know it; and whether
    all have the same values, of which each reads a part.

    Args:
        requests: Of the stream, in order.
        early: What the head start asked for.
        facts: What else decides who makes something of the bytes, and in which bands.
        checksums: Whether they are compared.

    Raises:
        ReadError: A file cannot be read.
    """
    entries = [request.entry for request in requests]
    ways = [(r.device.type, r.in_bands, r.batch, r.becomes, r.part) for r in requests]
    return {
        "the tensors' names, dtypes and shapes": _digest((e.name, e.dtype, e.shape, e.stride) for e in entries),
        "the tensors' values": sample_of(entries, state_of)[:12],
        "the tensors' checksums": _digest(e.crc32c if checksums else None for e in entries),
        "what becomes of them, and in which order": _digest(ways),
        "what the head start asked for": _digest(early),
        "scratch, kernels and quantizer": _digest([_core.has_kernels(), *facts]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: getattr(imported(name), "__version__", "not imported") for name in ("transformers", "pyint8")},
    }


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(repr(list(values)).encode(errors="surrogateescape")).hexdigest()[:12]


def check_alike(fingerprints: Sequence[Mapping[str, str]]) -> None:
    """Raises RankError with what the first rank that is unlike rank 0 has otherwise, unless all are alike."""
    rank = next((rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]), None)
    if rank is None:
        return
    zero, other = fingerprints[0], fingerprints[rank]
    unlike = [f"{name} ({zero[name]} and {other[name]})" for name in zero if zero[name] != other.get(name)]
    raise RankError(f"the ranks are about to load different things: ranks 0 and {rank} differ in {'; '.join(unlike)}")
