"""In which dtypes a load will have a model's weights, found while transformers has not read the configuration yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pyint8.checkpoint import DTYPES
from pyint8.checkpoint.find import configuration
from pyint8.errors import Pyint8Error

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint
    from pyint8.models.request import LoadRequest


def likely_dtypes(dtype: Any, checkpoint: Checkpoint | None, request: LoadRequest) -> list[torch.dtype]:
    """The model's dtype, as transformers finds it, and then those that parts of it may have; empty if it is not known.

    For "auto" it is the configuration's, or else that of the index of shards, or else that of the checkpoint's floating
    tensors, if they have one alone (source: transformers' _get_dtype). A class may be for a part of the model: it then
    reads that part's.

    Args:
        dtype: What was asked for: a torch.dtype, a dict of such, or "auto".
        checkpoint: What is to be loaded; None if it is not here yet.
        request: Of the load.
    """
    if isinstance(dtype, Mapping):
        named = [dtype.get("", torch.get_default_dtype()), *dtype.values()]
    else:
        named = _configured(checkpoint, request) if dtype == "auto" else [dtype]
    dtypes = [getattr(torch, each, None) if isinstance(each, str) else each for each in named]
    is_known = bool(dtypes) and isinstance(dtypes[0], torch.dtype)
    return [each for each in dtypes if isinstance(each, torch.dtype)] if is_known else []


def _configured(checkpoint: Checkpoint | None, request: LoadRequest) -> list[Any]:
    """What the configuration says, and then what its parts do; empty without one that can be read."""
    try:
        found = configuration(request.base, request.arguments)
    except Pyint8Error:  # transformers reports it
        found = None
    parts = [] if found is None else [found[1]]
    for part in parts:  # which grows
        parts += [value for value in part.values() if isinstance(value, dict)]
    named = [_named_in(part) for part in parts]
    if named[:1] == [None]:
        named[0] = None if checkpoint is None else _of_weights(checkpoint)
    return named


def _of_weights(checkpoint: Checkpoint) -> Any:
    """What an index says of the dtype, or else the one that all floating tensors have; None if that is not one."""
    if "dtype" in checkpoint.index_metadata:
        return checkpoint.index_metadata["dtype"]
    stored = {entry.dtype for entry in checkpoint.values() if entry.is_floating}
    return DTYPES[stored.pop()][1] if len(stored) == 1 else None


def _named_in(part: Mapping[str, Any]) -> Any:
    """What a configuration, or a part of one, says of its dtype; `torch_dtype` is its older name."""
    return part.get("torch_dtype") if part.get("dtype") is None else part["dtype"]
