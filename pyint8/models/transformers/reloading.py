"""From a checkpoint into the memory of a transformers model that is loaded; planned with stand-ins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pyint8.config import Int8Config
from pyint8.errors import CheckpointError, QuantizationStateError, ShapeMismatchError
from pyint8.models.assembly import Destination
from pyint8.models.live import Place, live_modules, places_of
from pyint8.models.origin import remember_reload
from pyint8.models.replacing import MOST_BYTES, Replacement, by_turns, require_alike, require_all
from pyint8.models.request import LoadRequest, check_dtype
from pyint8.models.transformers.compat import tied_weights
from pyint8.models.transformers.kept_plans import ReloadPlan, facts_of, keep_plan, kept_plan
from pyint8.models.transformers.loading import is_int8_already, plan_pretrained
from pyint8.quantizer import entry_for, has_int8_experts, is_int8, is_linear, why_not_experts
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation


def reload_pretrained(model: Any, request: LoadRequest, preparation: Preparation, recorder: Recorder) -> None:
    """Replaces the weights of `model`, which transformers or pyint8 has loaded, by those of a checkpoint.

    Args:
        model: Without wrappers; adapters in it stay.
        request: The path, and how to read it; what the model decides is added.
        preparation: What has begun already.
        recorder: Told of bytes as they land.

    Raises:
        PartlyReplacedError: It stopped halfway.
        Pyint8Error: The checkpoint cannot be that of the model; nothing was replaced.
    """
    with recorder.phase("build"):
        reload = _checked(model, request, preparation, recorder)
    remember_reload(model, reload.plan.load.checkpoint.files)
    with recorder.phase("stream"):
        reload.run(preparation)


def _checked(model: Any, request: LoadRequest, preparation: Preparation, recorder: Recorder) -> _Reload:
    """What can begin; planned only where the last reload of the model did not plan the same."""
    modules = dict(live_modules(model))
    places = places_of(modules)
    planning = replace(request, device_map={"": "cpu"}, dtype=_dtype(model), config=_config(modules, places))
    facts = facts_of(model, planning, preparation.checkpoint, places)
    kept = kept_plan(model, facts)
    if kept is not None and preparation.checkpoint is not None:
        reload = _Reload(kept.plan.of(preparation.checkpoint), places, recorder)
        kept.tell(recorder.report)
        reload.leave_out_what_is_alike()
        return reload
    reload = _Reload(_planned(model, planning, preparation, recorder), places, recorder)
    reload.check(strict=request.strict)
    reload.leave_out_what_is_alike()
    are_known = reload.plan.load.checkpoint is preparation.checkpoint
    keep_plan(model, facts if are_known else None, reload.plan, recorder.report)
    return reload


def _planned(model: Any, planning: LoadRequest, preparation: Preparation, recorder: Recorder) -> ReloadPlan:
    if is_int8_already(type(model), planning):
        planning = replace(planning, config=None)
    with torch.random.fork_rng(devices=[]):  # weights that a checkpoint lacks are drawn at random
        stand_in, load = plan_pretrained(planning, preparation, recorder, model_class=type(model))
    stand_ins = [load.stand_ins(target) for target in load.plan.targets]
    return ReloadPlan(stand_in, load, {name: value for made in stand_ins for name, value in made.items()})


def _dtype(model: Any) -> torch.dtype:
    """What the model was loaded as; some of its parameters may have been cast since."""
    dtype = check_dtype(getattr(model.config, "dtype", None))
    found: torch.dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype
    return found


def _config(modules: Mapping[str, nn.Module], places: Mapping[str, Place]) -> Int8Config:
    """What makes those modules int8 that are it in the model."""
    codes = [name.removesuffix(".weight") for name, place in places.items() if place.is_int8]
    others = [name for name, module in modules.items() if is_linear(module) and not is_int8(module)]
    experts = any(has_int8_experts(module) for module in modules.values())
    if experts:
        others += [name for name, module in modules.items() if why_not_experts(module) is None]
    return Int8Config(skip_modules=[entry_for(name, codes) for name in others], experts=experts)


class _Reload:
    """What a checkpoint has for a model, and where the model has it.

    Args:
        plan: What the checkpoint has.
        places: Of the model that is loaded.
        recorder: Told of bytes as they land.

    Attributes:
        plan: As given.
    """

    def __init__(self, plan: ReloadPlan, places: Mapping[str, Place], recorder: Recorder) -> None:
        self.plan = plan
        self._load = plan.load
        self._made = plan.made
        self._places = places
        self._recorder = recorder
        self._left_out: dict[str, str] = {}

    def check(self, *, strict: bool) -> None:
        """Refuses what the model has no place for, and what would stay as it is."""
        for name, value in self._made.items():
            self._check(name, value)
        require_all(self._lost(), self._load.checkpoint.files[0], strict=strict)

    def leave_out_what_is_alike(self) -> None:
        """Of what goes to the same memory one is enough; refuses what has other values, which may be read for that."""
        made_by = self._load.plan.made_by
        single = [name for name in self._made if name in made_by and len(made_by[name].makes()) == 1]
        self._left_out = require_alike(single, self._places, self._load.are_alike)

    def _check(self, name: str, value: torch.Tensor) -> None:
        place, where = self._places.get(name), self._load.locate(name)
        if place is None:
            raise CheckpointError(
                f"it is for {name}, which the model does not have; is it of this architecture?", **where
            )
        becomes_int8 = hasattr(value, "SCB")
        if becomes_int8 != place.is_int8:
            kinds = ["is not quantized", "is int8"]
            raise QuantizationStateError(
                f"{name} {kinds[place.is_int8]} in the model, and what the checkpoint gives {kinds[becomes_int8]}. "
                "Nothing was replaced; load the checkpoint as a model of its own",
                **where,
            )
        if tuple(value.shape) != place.shape:
            raise ShapeMismatchError(
                f"{name} is {list(value.shape)} in this checkpoint, and {list(place.shape)} in the model", **where
            )
        if value.dtype != place.dtype and not (value.is_floating_point() and place.dtype.is_floating_point):
            raise CheckpointError(
                f"{name} is {value.dtype} in this checkpoint, and {place.dtype} in the model", **where
            )

    def _lost(self) -> set[str]:
        """What would keep its values, and should not."""
        reached = {place.address for places in self._targets().values() for place in places}
        missing = set(self._recorder.report.loading_info["missing_keys"])
        known = set(self.plan.stand_in.state_dict())
        kept = {name for name, place in self._places.items() if place.address not in reached}
        return {name for name in kept if name in missing or name not in known}

    def _targets(self) -> dict[str, Sequence[Place]]:
        """Where the values go: also to what is tied to them, but has memory of its own."""
        ties = tied_weights(self.plan.stand_in)
        targets = {name: [self._places[name]] for name in self._made if name not in self._left_out}
        for name, place in self._places.items():
            source = name
            while source not in self._made and source in ties:
                source = ties[source]
            if source != name and source in targets and place.address != self._places[source].address:
                targets[source].append(place)
        return dict(targets)

    def run(self, preparation: Preparation) -> None:
        """Replaces everything."""
        names = [name for name in self._load.plan.targets if name not in self._left_out]
        maker = self._load.maker_of(names, dict(self._destinations()), preparation, self._recorder, MOST_BYTES)
        replacement = Replacement(self._targets(), self._require_sound)
        with replacement.reported(), closing(maker):
            replacement.run(by_turns(names, lambda name: self._places[name].device), maker)

    def _destinations(self) -> Iterator[tuple[str, Destination]]:
        """A value becomes what the model has there; what becomes int8 is rounded to the model's dtype before."""
        for name in self._made:
            place = self._places[name]
            dtype = place.dtype if place.dtype.is_floating_point else self._load.dtypes.get(name, place.dtype)
            yield name, Destination(place.device, dtype)

    def _require_sound(self) -> None:
        self._load.check_values()
        self._load.checkpoint.require_unchanged(self._load.checkpoint.files)
