"""Buffers that a model computes in its constructor and does not save: from_pretrained may lose them.

transformers builds a model on meta, where nothing is computed, and gives such buffers memory afterwards; only
`_init_weights` puts values there. A class that computes them in `__init__` alone is left with what was in the memory.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("pyint8")


def warn_of_unset_buffers(model: Any) -> None:
    """One warning for the buffers that nothing has written to since they have memory."""
    unset = list(_unset(model))
    if unset:
        logger.warning(
            "%s: %s never got their values, and hold what was in the memory before. transformers' from_pretrained runs "
            "no constructor with values; let the class's _init_weights set them, or save them (persistent=True)",
            type(model).__name__,
            ", ".join(unset),
        )


def _unset(model: Any) -> Iterator[str]:
    """A write in place counts up a tensor's version; a tensor that replaces another may have none, so a buffer that
    the class's own `_init_weights` mentions is taken to be set."""
    code = _own_initialization(type(model))
    if code is None:
        return
    for name, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(leaf)
            if buffer is None or buffer.is_meta or buffer.numel() == 0:
                continue
            if buffer._version == 0 and leaf not in code:
                yield f"{name}.{leaf}" if name else leaf


def _own_initialization(kind: type) -> str | None:
    """The source of every `_init_weights` of a class; None where one has no source, and may set anything."""
    functions = [vars(cls)["_init_weights"] for cls in kind.__mro__ if "_init_weights" in vars(cls)]
    try:
        return "\n".join(map(inspect.getsource, functions))
    except (OSError, TypeError):
        return None
