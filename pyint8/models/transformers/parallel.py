"""Models split over ranks: transformers loads int8 ones silently, and they fail in the first forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyint8.errors import PlacementError
from pyint8.host.processes import processes


def refuse_split_models(arguments: Mapping[str, Any]) -> None:
    """Refuse `distributed_config`, `device_mesh`, `tp_plan` and `tp_size` that split a model over more than one rank.

    Args:
        arguments: Those of from_pretrained.

    Raises:
        PlacementError: Naming the argument.
    """
    for name in ("distributed_config", "device_mesh", "tp_plan", "tp_size"):
        ranks = _ranks(name, arguments.get(name))
        if ranks > 1:
            raise PlacementError(
                f"{name} splits the model over {ranks} ranks, and bitsandbytes' int8 modules cannot be split (their "
                'scales would be lost). Load a whole model on each rank, device_map="cuda", or spread one over the '
                'GPUs of one process, device_map="auto"'
            )


def _ranks(name: str, value: Any) -> int:
    """The number of ranks over which an argument with this value splits a model."""
    if value is None:
        return 1
    if name == "device_mesh":
        return int(value.size()) if callable(getattr(value, "size", None)) else processes().total
    if name == "tp_size":
        return int(value)
    if name == "tp_plan":
        return processes().total
    fields = value if isinstance(value, Mapping) else vars(value)
    sizes = [size for field, size in fields.items() if field.endswith("_size") and isinstance(size, int)]
    if fields.get("tp_plan") is not None and fields.get("tp_size") is None:
        sizes.append(processes().total)
    return max(sizes, default=1)
