"""What a checkpoint will be as an int8 model, and where that goes: all that is decided before a tensor is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pyint8.checkpoint.shards import Shards
from pyint8.errors import PlacementError
from pyint8.models.checks import FORMAT, SCALES
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.compat import final_device_map
from pyint8.models.transformers.converting import Conversion
from pyint8.models.transformers.loading import plan_pretrained
from pyint8.models.transformers.planned import PlannedLoad
from pyint8.placement.budget import MemoryBudget
from pyint8.placement.device_map import device_name, device_of
from pyint8.quantizer import EXPERT_SCALES, expert_scales, int8_modules
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation

_MAX_SHARD_SIZE = "5GB"  # the default of save and convert


@dataclass(frozen=True)
class Placement:
    """Where a model would go.

    Attributes:
        device_map: Modules to devices.
        nbytes: What of the model is on each device, by its name in device maps.
        problem: Why `pyint8.load` would refuse it; None where it fits.
    """

    device_map: Mapping[str, Any]
    nbytes: Mapping[str, int]
    problem: str | None


@dataclass(frozen=True)
class InspectedModel:
    """A transformers model that was planned, not loaded.

    Attributes:
        class_name: Of the model.
        load: Its load, with the checkpoint.
        int8: The modules that become int8, by name.
        shards: The files of the int8 checkpoint; None if nothing becomes int8.
        ties_assumed: Parameters to those whose memory they will share if the checkpoint has the same values for both.
        placement: Where it would go.
    """

    class_name: str
    load: PlannedLoad
    int8: tuple[str, ...]
    shards: Shards | None
    ties_assumed: Mapping[str, str]
    placement: Placement


def inspect_pretrained(request: LoadRequest, plan: str, recorder: Recorder) -> InspectedModel:
    """Plans a load with transformers, and the int8 checkpoint and the device map with it.

    Args:
        request: What was asked for.
        plan: A word for a planned device map.
        recorder: Its report gets what is skipped, and why.

    Raises:
        Pyint8Error: What `plan_pretrained` raises.
    """
    placements: list[Placement] = []
    offloads = request.config is not None and request.config.fp32_cpu_offload

    def note(model: Any, quantizer: Any) -> None:
        placements.append(_placed(model, quantizer, plan, request.budget, offloads=offloads))

    preparation = Preparation(None, request.options)
    model, load = plan_pretrained(_on_one_device(request), preparation, recorder, place=note)
    ties: dict[str, str] = {}

    def assume(one: str, other: str) -> bool:
        ties[one] = other
        return True

    experts = dict.fromkeys(name.rpartition(".")[0] for name in expert_scales(model))
    codes = (*int8_modules(model), *experts)
    shards = Conversion(model, load, _MAX_SHARD_SIZE, assume).shards if codes else None
    return InspectedModel(type(model).__name__, load, codes, shards, ties, placements[0])


def _on_one_device(request: LoadRequest) -> LoadRequest:
    """The request with nothing placed yet: what is offloaded would not become int8."""
    config = None if request.config is None else replace(request.config, fp32_cpu_offload=False)
    return replace(request, device_map={"": "cpu"}, config=config)


class _AnyMachine:
    """transformers' quantizer for its planner, without looking whether this machine has the devices."""

    def __init__(self, quantizer: Any) -> None:
        self._quantizer = quantizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._quantizer, name)

    def validate_environment(self, **_: Any) -> None:
        pass


def _placed(model: Any, quantizer: Any, plan: str, budget: MemoryBudget, *, offloads: bool) -> Placement:
    memory = None if budget.per_device is None else dict(budget.per_device)  # accelerate writes into it
    with _not_told_of_absent_devices():
        device_map = final_device_map(model, plan, memory, _AnyMachine(quantizer))
    nbytes: Counter[str] = Counter()
    for name, size in quantizer.tensor_bytes.items():
        nbytes[device_name(device_of(name, device_map))] += size
    problem = None if offloads else _problem(quantizer, device_map)
    return Placement({name: device_name(device) for name, device in device_map.items()}, dict(nbytes), problem)


@contextmanager
def _not_told_of_absent_devices() -> Iterator[None]:
    """accelerate warns of devices in `max_memory` that this machine lacks; here they may be another machine's."""
    accelerate = logging.getLogger("accelerate.utils.modeling")

    def is_told(record: logging.LogRecord) -> bool:
        return "is not available, available devices are" not in record.getMessage()

    accelerate.addFilter(is_told)
    try:
        yield
    finally:
        accelerate.removeFilter(is_told)


def _problem(quantizer: Any, device_map: Mapping[str, Any]) -> str | None:
    try:
        quantizer.int8.validate_environment(device_map=device_map)
    except PlacementError as error:
        return error.problem
    return None


def kinds_of(shards: Shards) -> dict[str, int]:
    """The bytes of an int8 checkpoint's tensors by kind: "int8", "scales", "formats" and "unquantized"."""
    nbytes: Counter[str] = Counter()
    for plan in (plan for plans in shards.files.values() for plan in plans):
        nbytes[_kind(plan.name, shards)] += plan.nbytes
    return dict(nbytes)


def _kind(name: str, shards: Shards) -> str:
    if name.endswith(EXPERT_SCALES) or name + EXPERT_SCALES in shards.file_of:  # experts, whole
        return "scales" if name.endswith(EXPERT_SCALES) else "int8"
    module, _, leaf = name.rpartition(".")
    if f"{module}.{SCALES}" not in shards.file_of:
        return "unquantized"
    return {"weight": "int8", SCALES: "scales", FORMAT: "formats"}.get(leaf, "unquantized")
