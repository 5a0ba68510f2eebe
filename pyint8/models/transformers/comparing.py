"""An int8 checkpoint beside what converting its source would give, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyint8.checkpoint import Checkpoint
from pyint8.errors import CheckpointError, Pyint8Error, ShapeMismatchError
from pyint8.models.transformers.converting import Conversion
from pyint8.models.verifying import Verifier


class Comparison:
    """Takes the tensors of a conversion, and compares them with those of a checkpoint.

    Args:
        checkpoint: The int8 one.
        conversion: Of its source.

    Attributes:
        order: The names of the checkpoint's tensors, in the order in which they are compared; the others at the end.
        not_compared: Those for which the source has no values (a fresh head), by name.
    """

    waits = False

    def __init__(self, checkpoint: Checkpoint, conversion: Conversion) -> None:
        self._checkpoint = checkpoint
        self._conversion = conversion
        self.not_compared = frozenset(conversion.initialized)
        made = [name for name in conversion.order() if name in checkpoint and name not in self.not_compared]
        self.order = list(dict.fromkeys([*made, *checkpoint]))
        self._verifier: Verifier | None = None
        self._checked: set[str] = set()

    def misfits(self) -> Iterator[Pyint8Error]:
        """What the headers show: tensors that are missing, or not of the source, or have another dtype or shape."""
        planned = {plan.name: plan for plans in self._conversion.shards.files.values() for plan in plans}
        for name, plan in planned.items():
            entry = self._checkpoint.entries.get(name)
            if entry is None:
                yield CheckpointError("the source gives this tensor, and it is not there", tensor=name)
            elif (entry.dtype, entry.shape) != (plan.dtype, plan.shape):
                yield ShapeMismatchError(
                    f"it is {entry.dtype} {list(entry.shape)}, and the source gives {plan.dtype} {list(plan.shape)}",
                    **entry.location,
                )
        for name, entry in self._checkpoint.items():
            if name not in planned:
                yield CheckpointError("the source gives no such tensor", **entry.location)

    def begin(self, verifier: Verifier) -> None:
        """Says who compares."""
        self._verifier = verifier

    def put(self, name: str, value: torch.Tensor) -> None:
        """Compares a tensor."""
        entry = self._checkpoint.entries.get(name)
        if entry is None or name in self.not_compared or entry.nbytes != value.nbytes:
            return
        assert self._verifier is not None
        self._checked.add(name)
        self._verifier.check(name, value.detach().contiguous().reshape(-1).view(torch.uint8).cpu())

    def note_sound(self) -> None:
        """Nothing waits for that."""

    def left(self) -> list[str]:
        """The checkpoint's tensors that were not compared, by name."""
        return [name for name in self._checkpoint if name not in self._checked]
