"""From a checkpoint to its int8 form, a few tensors at a time: the model itself never holds a value of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch

from pyint8.checkpoint.shards import shards_of
from pyint8.models.assembly import Destination
from pyint8.models.checks import FORMAT, SCALES
from pyint8.models.saving import MOST_BYTES, planned
from pyint8.models.transformers.compat import in_conversions, reverted
from pyint8.models.transformers.planned import PlannedLoad
from pyint8.models.transformers.saving import require_saveable, revertible_int8, saved_form, scales_as_saved
from pyint8.quantizer import expert_scales, int8_modules
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation

State = dict[str, torch.Tensor]


class Sink(Protocol):
    """What takes the tensors of an int8 checkpoint."""

    def put(self, name: str, value: torch.Tensor) -> None:
        """Takes a tensor, ordered before its device's current stream, and not to be changed any more."""

    @property
    def waits(self) -> bool:
        """Whether it wants to know that what it has is sound."""

    def note_sound(self) -> None:
        """Is told that."""


class Conversion:
    """What a checkpoint becomes, known before a tensor of it is read.

    Args:
        model: The model, with stand-ins for what the checkpoint has.
        load: Its load.
        max_shard_size: Of one file.
        equal: Whether two tied parameters that the checkpoint has both are the same; None reads them.
        fused_experts: See `revertible_int8`.

    Attributes:
        shards: The files to write.
        initialized: What the checkpoint has no values for, and the int8 one will, by name.

    Raises:
        ModelNotSupportedError: Nothing becomes int8.
        OptionError: `max_shard_size` is no size.
    """

    def __init__(
        self,
        model: Any,
        load: PlannedLoad,
        max_shard_size: int | str,
        equal: Callable[[str, str], bool] | None = None,
        *,
        fused_experts: bool = False,
    ) -> None:
        self._model = model
        self._load = load
        _tie(model, load, equal)
        require_saveable(model)
        own: State = model.state_dict()
        self._codes = int8_modules(model)
        belonging = {f"{name}.{leaf}" for name in self._codes for leaf in ("weight", SCALES, FORMAT)}
        self._conversions = revertible_int8(model, belonging, fused_experts=fused_experts)
        self._expert_scales = set(expert_scales(model))
        self._converted = in_conversions(self._conversions or (), own)
        saved = saved_form(model, own, lambda _, value: value, fused_experts=fused_experts)
        names = {id(value): name for name, value in saved.items()}
        self._names = {name: names[id(value)] for name, value in own.items() if id(value) in names}
        self.initialized: State = {
            self._names[name]: value for name, value in own.items() if self._is_initialized(name)
        }
        self.shards = shards_of((planned(name, value) for name, value in saved.items()), max_shard_size)

    def _is_initialized(self, name: str) -> bool:
        """Whether the checkpoint has no such tensor, but the int8 one will."""
        module, _, leaf = name.rpartition(".")
        made_by = self._load.plan.made_by
        belongs = leaf in (SCALES, FORMAT) and module in self._codes
        return (
            name in self._names
            and name not in self._expert_scales
            and (f"{module}.weight" if belongs else name) not in made_by
        )

    @property
    def num_parameters(self) -> int:
        return int(self._model.num_parameters())

    def routers(self) -> set[str]:
        """The names of tensors that transformers 4 may have quantized, and that stay ordinary here."""
        return {saved for name, saved in self._names.items() if self._load.may_be_router(name)}

    def order(self) -> list[str]:
        """The names of all tensors, in the order in which `run` makes them."""
        made = (name for target in self._load.plan.targets for name in self._saved_by(target))
        return [*self.initialized, *made]

    def run(
        self,
        sink: Sink,
        done: Collection[str],
        devices: Sequence[torch.device],
        preparation: Preparation,
        recorder: Recorder,
    ) -> None:
        """Makes the tensors, a few at a time.

        Args:
            sink: Takes them.
            done: The names of those that it need not have.
            devices: Where weights are quantized.
            preparation: What has begun already.
            recorder: Told of bytes as they land.

        Raises:
            Pyint8Error: A tensor cannot be read or quantized; or what the sink raises.
        """
        names = [name for name in self._load.plan.targets if not set(self._saved_by(name)) <= set(done)]
        destinations = self._destinations(names, devices)
        with closing(self._load.maker_of(names, destinations, preparation, recorder, MOST_BYTES)) as maker:
            self._put(self.initialized, sink)
            for name in names:
                parts = self._saved_parts(maker.make(name, None))
                maker.wait(name)
                self._put(parts, sink)
                maker.release(name)
            self._load.check_values()

    def _put(self, parts: State, sink: Sink) -> None:
        for name, value in parts.items():
            sink.put(name, value)
        if sink.waits:
            self._load.check_values()
            sink.note_sound()

    def _saved_parts(self, made: State) -> State:
        """What is written of a target's parameters, by the checkpoint's names."""
        state = {part: value for name, parameter in made.items() for part, value in self._parts(name, parameter)}
        scales = {name: state.pop(name) for name in self._expert_scales & state.keys()}
        of_experts = scales_as_saved(self._model, scales, self._conversions) if scales else {}
        if self._converted.isdisjoint(state):
            return {self._names[name]: value for name, value in state.items() if name in self._names} | of_experts
        parts = reverted(self._model, state, self._conversions) | of_experts
        return {name: value for name, value in parts.items() if name in self.shards.file_of}

    def _parts(self, name: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A parameter as a state dict has it."""
        module = name.removesuffix(".weight")
        yield name, parameter.data
        if module != name and module in self._codes:
            yield f"{module}.{SCALES}", parameter.SCB  # type: ignore[attr-defined]
            yield f"{module}.{FORMAT}", torch.zeros((), dtype=torch.uint8)  # row-major, as bitsandbytes has it

    def _saved_by(self, target: str) -> list[str]:
        """The names of all that is written of a target."""
        return list(self._saved_parts(self._load.stand_ins(target)))

    def _destinations(self, names: Sequence[str], devices: Sequence[torch.device]) -> dict[str, Destination]:
        """Each target's parameters on one device, by turns."""
        dtypes, targets = self._load.dtypes, self._load.plan.targets
        return {
            made: Destination(devices[number % len(devices)], dtypes[made])
            for number, name in enumerate(names)
            for made in targets[name].makes()
            if made in dtypes
        }


def _tie(model: Any, load: PlannedLoad, equal: Callable[[str, str], bool] | None) -> None:
    """Ties what transformers would have tied, had it seen values: parameters that the checkpoint has twice, alike."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if not {target, source} <= load.plan.made_by.keys():
            continue
        if load.are_alike(target, source, equal):
            owner, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter_or_buffer(source))
        else:
            del model.all_tied_weights_keys[target]
