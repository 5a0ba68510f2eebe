"""What a reload has planned, kept for the next one of the same model: in a loop checkpoints differ by values alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pyint8.checkpoint import Checkpoint
from pyint8.errors import ReadError
from pyint8.host.files import open_file
from pyint8.models.live import Place
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.planned import PlannedLoad
from pyint8.report import LoadReport

_CONFIGURATION = "config.json"
_WARNED_OF = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass(frozen=True)
class Facts:
    """All that a plan follows from; plans of equal facts are the same.

    Attributes:
        asked: How the stand-in is made: the model's class, its dtype, what is int8 in it, and the caller's arguments.
        configuration: The checkpoint's, as its file has it.
        tensors: The checkpoint's: dtype, shape, and in what order elements lie, by name.
        places: Where the model has its own: shape, dtype, memory, and whether it is int8, by name.
    """

    asked: tuple[Any, ...]
    configuration: bytes
    tensors: Mapping[str, tuple[Any, ...]]
    places: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class ReloadPlan:
    """What a checkpoint has for a model.

    Attributes:
        stand_in: The model on meta, as the checkpoint would have made it.
        load: Its load, of which nothing has started.
        made: What the load will make, by name, on meta.
    """

    stand_in: Any
    load: PlannedLoad
    made: Mapping[str, torch.Tensor]

    def of(self, checkpoint: Checkpoint) -> ReloadPlan:
        """The same for another checkpoint, from which no other facts follow."""
        return replace(self, load=self.load.of(checkpoint))


@dataclass(frozen=True)
class KeptPlan:
    """A plan that was checked.

    Attributes:
        facts: What it follows from.
        plan: With the checkpoint that it was made for.
        told: What the report says of it, by field.
    """

    facts: Facts
    plan: ReloadPlan
    told: Mapping[str, Any]

    def tell(self, report: LoadReport) -> None:
        """Says in another report what the first said."""
        for name, value in copy.deepcopy(dict(self.told)).items():
            setattr(report, name, value)


_plans: WeakKeyDictionary[Any, KeptPlan] = WeakKeyDictionary()
"""By model; it takes single steps of a dictionary, and each plan is never changed."""


def facts_of(
    model: Any, request: LoadRequest, checkpoint: Checkpoint | None, places: Mapping[str, Place]
) -> Facts | None:
    """What the plan of a reload follows from; None where that is not known before transformers has looked for files.

    Args:
        model: That is loaded.
        request: What the stand-in is asked for as.
        checkpoint: The folder's.
        places: Of the model.
    """
    configuration = _configuration(request)
    if checkpoint is None or checkpoint.disagreements or configuration is None:
        return None
    # Copies, as the caller may change a mapping later, with their order, in which names are replaced.
    arguments = {k: (*v.items(),) if isinstance(v, Mapping) else v for k, v in request.arguments.items()}
    return Facts(
        (type(model), request.dtype, request.config, request.strict, arguments),
        configuration,
        {entry.name: (type(entry), entry.dtype, entry.shape, entry.stride) for entry in checkpoint.values()},
        {name: (place.shape, place.dtype, place.address, place.is_int8) for name, place in places.items()},
    )


def _configuration(request: LoadRequest) -> bytes | None:
    path = os.path.join(request.path, request.arguments.get("subfolder") or "", _CONFIGURATION)
    try:
        with open_file(path) as file:
            return file.read()
    except (OSError, ReadError):  # of a hub id, say: transformers finds it
        return None


def kept_plan(model: Any, facts: Facts | None) -> KeptPlan | None:
    """The plan that was kept for a model, if it follows from the same facts."""
    kept = _plans.get(model)
    return kept if kept is not None and kept.facts == facts else None


def keep_plan(model: Any, facts: Facts | None, plan: ReloadPlan, report: LoadReport) -> None:
    """Keeps a plan for as long as its model lives, or until another is: if there was nothing in it to warn of."""
    if facts is None or any(report.loading_info.get(kind) for kind in _WARNED_OF):
        _plans.pop(model, None)
        return
    told = {name: getattr(report, name) for name in ("loading_info", "skipped", "skipped_bytes")}
    _plans[model] = KeptPlan(facts, plan, copy.deepcopy(told))
