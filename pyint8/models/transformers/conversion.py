"""Standing in transformers' loading loop: two weight transforms that know the plan and never let it read a file.

transformers asks the quantizer for the list of weight transforms (`update_weight_conversions`), renames every key by
it, and lets the transforms that matched make the parameters. Ours claim every key that has a place in the model:
the renaming answers from the plan, the converter makes the parameter of what the stream delivers, and the reads that
transformers prepared are dropped unused. The genuine transforms were asked when the plan was made, and make what
needs converting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyint8.models.transformers.compat import ConversionOps, WeightConverter, WeightRenaming
from pyint8.models.transformers.plan import LoadPlan

_CLAIMED = "pyint8"

# Called with the target's name and transformers' loading info; returns parameters by name.
MakeParameters = Callable[[str, Any], dict[str, Any]]


class PlannedRenaming(WeightRenaming):
    """Renames as all of the model's renamings and converters together do, by looking into the plan."""

    __slots__ = ("_plan",)

    def __init__(self, plan: LoadPlan) -> None:
        super().__init__([_CLAIMED], [_CLAIMED])
        object.__setattr__(self, "_plan", plan)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self._plan.renamed.get(source_key, source_key), None

    def was_used(self) -> bool:
        return False  # nothing for saving to revert


class PlannedConverter(WeightConverter):
    """Claims every renamed key with a place in the model, and makes its parameter."""

    __slots__ = ("_make", "_plan")

    def __init__(self, plan: LoadPlan, make: MakeParameters) -> None:
        super().__init__([_CLAIMED], [_CLAIMED], [_Unused()])
        object.__setattr__(self, "_plan", plan)
        object.__setattr__(self, "_make", make)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, _CLAIMED if source_key in self._plan.claimed else None

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Drops transformers' read; the plan knows the sources."""

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
        """transformers copies a converter for each target; this one keeps nothing by target."""
        return self


class _Unused(ConversionOps):
    """A converter must have an operation."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict
