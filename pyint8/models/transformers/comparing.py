"""An int8 checkpoint beside what converting its source would give, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyint8.checkpoint import Checkpoint
from pyint8.errors import CheckpointError, Pyint8Error, ShapeMismatchError
from pyint8.models.checks import FORMAT, SCALES
from pyint8.models.transformers.converting import Conversion
from pyint8.models.verifying import Verifier
from pyint8.quantizer import codes_of


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
        # of a mixture that transformers 4 saved
        self._int8_routers = {name for name in conversion.routers() & checkpoint.keys() if _is_int8(checkpoint, name)}
        self._verifier: Verifier | None = None
        self._checked: set[str] = set()

    def misfits(self) -> Iterator[Pyint8Error]:
        """What the headers show: tensors that are missing, or not of the source, or have another dtype or shape."""
        planned = {plan.name: plan for plans in self._conversion.shards.files.values() for plan in plans}
        for name, plan in planned.items():
            if name in self._int8_routers:
                continue
            entry = self._checkpoint.entries.get(name)
            if entry is None:
                yield CheckpointError("the source gives this tensor, and it is not there", tensor=name)
            elif (entry.dtype, entry.shape) != (plan.dtype, plan.shape):
                yield ShapeMismatchError(
                    f"it is {entry.dtype} {list(entry.shape)}, and the source gives {plan.dtype} {list(plan.shape)}",
                    **entry.location,
                )
        for name, entry in self._checkpoint.items():
            if name not in planned and not self._is_companion(name):
                yield CheckpointError("the source gives no such tensor", **entry.location)

    def _is_companion(self, name: str) -> bool:
        """Whether it belongs to codes, and `convert` writes none: scales of a router, or a format that loads ignore."""
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight"
        return weight in self._int8_routers if leaf == SCALES else leaf == FORMAT and _is_int8(self._checkpoint, weight)

    def begin(self, verifier: Verifier) -> None:
        """Says who compares."""
        self._verifier = verifier

    def put(self, name: str, value: torch.Tensor) -> None:
        """Compares a tensor."""
        if name in self._int8_routers:
            codes, scales = codes_of(value)
            self._compare(name, codes)
            self._compare(f"{name.removesuffix('weight')}{SCALES}", scales)
        else:
            self._compare(name, value)

    def _compare(self, name: str, value: torch.Tensor) -> None:
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


def _is_int8(checkpoint: Checkpoint, name: str) -> bool:
    entry = checkpoint.entries.get(name)
    return entry is not None and entry.dtype == "I8"
