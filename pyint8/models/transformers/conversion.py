"""Weight transforms for transformers' loading loop, which follow the plan and never let it read a file.

transformers asks the quantizer for the list of weight transforms (`update_weight_conversions`), renames every key by
it, and lets the transforms that matched make the parameters. Ours match every key that has a place in the model: the
renaming looks it up in the plan, the converter makes the parameter from the stream, and the reads that transformers
prepared are discarded unused. Of what a parameter is merged of, the first key alone gets there: the loop would prepare
as much for each tensor of an expert. The model's own transforms were evaluated when the plan was made; they still do
the conversions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyint8.models.transformers.compat import ConversionOps, WeightConverter, WeightRenaming
from pyint8.models.transformers.plan import LoadPlan

_CLAIMED = "pyint8"
_FURTHER = "pyint8-further"

# Called with the target's name and transformers' loading info; returns parameters by name.
MakeParameters = Callable[[str, Any], dict[str, Any]]


class PlannedRenaming(WeightRenaming):
    """Renames as all of the model's renamings and converters together do, by a lookup in the plan."""

    __slots__ = ("_plan",)

    def __init__(self, plan: LoadPlan) -> None:
        super().__init__([_CLAIMED], [_CLAIMED])
        object.__setattr__(self, "_plan", plan)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self._plan.further:
            return _FURTHER, None
        return self._plan.renamed.get(source_key, source_key), None

    def was_used(self) -> bool:
        return False  # nothing for saving to revert


class FurtherSources(WeightConverter):
    """Matches every tensor but the first of those that make a parameter: the loop has nothing to do for it.

    For a tensor whose name is none of the model's, transformers notes as unexpected what its converter would make;
    this one would make nothing.
    """

    def __init__(self) -> None:
        super().__init__([_FURTHER], [], [_Unused()])

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, _FURTHER if source_key == _FURTHER else None

    def was_used(self) -> bool:
        return False


class PlannedConverter(WeightConverter):
    """Matches every renamed key with a place in the model, and makes its parameter."""

    __slots__ = ("_make", "_plan")

    def __init__(self, plan: LoadPlan, make: MakeParameters) -> None:
        super().__init__([_CLAIMED], [_CLAIMED], [_Unused()])
        object.__setattr__(self, "_plan", plan)
        object.__setattr__(self, "_make", make)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, _CLAIMED if source_key in self._plan.claimed else None

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Discards transformers' read; the plan knows the sources."""

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        return self._make(layer_name, loading_info)  # type: ignore[no-any-return]

    def was_used(self) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedConverter:
        """transformers copies a converter for each target; this one has no state of a target."""
        return self


class _Unused(ConversionOps):
    """A converter must have an operation."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict
