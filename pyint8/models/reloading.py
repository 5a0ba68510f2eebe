"""From a checkpoint into a plain module that is filled already."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pyint8.checkpoint import Checkpoint
from pyint8.config import Int8Config
from pyint8.errors import CheckpointError, first_names
from pyint8.models import checks
from pyint8.models.assembly import Assembly, Destination, Stored
from pyint8.models.live import Place, live_modules, places_of
from pyint8.models.origin import remember_reload
from pyint8.models.reconcile import check_stored
from pyint8.models.replacing import MOST_BYTES, Replacement, by_turns, require_alike, require_all
from pyint8.models.request import LoadRequest
from pyint8.quantizer import Int8Quantizer, find_entry_point, is_int8
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.reading import are_alike, open_stream
from pyint8.streaming.stream import TensorStream

logger = logging.getLogger(__name__)


def reload_module(module: nn.Module, request: LoadRequest, preparation: Preparation, recorder: Recorder) -> None:
    """Replaces the weights of `module`, which is filled, by those of a checkpoint that has its names.

    Raises:
        PartlyReplacedError: It stopped halfway.
        Pyint8Error: The checkpoint cannot be that of the module; nothing was replaced.
    """
    checkpoint = preparation.checkpoint
    assert checkpoint is not None
    with recorder.phase("build"):
        reload = _Reload(module, checkpoint, request, recorder)
        reload.check()
    remember_reload(module, checkpoint.files)
    with recorder.phase("stream"):
        preparation.stop_prefetch()
        reload.run(request)


class _Reload:
    """What a checkpoint has for a module, and where the module has it."""

    def __init__(self, module: nn.Module, checkpoint: Checkpoint, request: LoadRequest, recorder: Recorder) -> None:
        self._checkpoint = checkpoint
        self._recorder = recorder
        pre_quantized = checkpoint.has_codes
        self._quantizer = Int8Quantizer(Int8Config(), pre_quantized=pre_quantized, strict=request.strict)
        modules = dict(live_modules(module))
        self._quantizer.adopt({name: each for name, each in modules.items() if is_int8(each)})
        ordinary = (name for name in modules if name not in self._quantizer.converted)
        self._quantizer.skipped = dict.fromkeys(ordinary, "it is not int8 in the module")
        self._quantizer.validate_environment()
        self._places = places_of(modules)
        self._wanted = {name: self._stored(name) for name in checkpoint if name in self._places}

    def _stored(self, name: str) -> Stored:
        scales, layout = (self._companions(name, leaf) for leaf in (checks.SCALES, checks.FORMAT))
        return Stored(self._checkpoint[name], scales, layout)

    def _companions(self, name: str, leaf: str) -> Any:
        module, _, own = name.rpartition(".")
        return self._checkpoint.entries.get(f"{module}.{leaf}") if own == "weight" else None

    def check(self) -> None:
        """Refuses what the module has no place for, and what would stay as it is."""
        checks.check_disagreements(self._checkpoint, self._need, strict=self._quantizer.strict)
        if self._places and not self._wanted:
            checks.refuse_unrelated(self._checkpoint, self._places)
        for name, stored in self._wanted.items():
            self._check(name, stored)
        reached = {self._places[name].address for name in self._wanted}
        lost = {name for name, place in self._places.items() if place.address not in reached}
        unexpected = self._unexpected()
        self._recorder.report.loading_info = {"missing_keys": lost, "unexpected_keys": set(unexpected)}
        if unexpected:
            logger.warning("the checkpoint's %s have no place in the module", first_names(unexpected, 10))
        require_all(lost, self._checkpoint.files[0], strict=self._quantizer.strict)
        for name in require_alike(self._wanted, self._places, self._are_alike):
            del self._wanted[name]

    def _need(self, name: str) -> checks.Need:
        module, _, leaf = name.rpartition(".")
        if leaf == checks.SCALES and self._quantizer.pre_quantized and module in self._quantizer.converted:
            return checks.Need.REQUIRED
        return checks.Need.WANTED if name in self._places else checks.Need.NONE

    def _check(self, name: str, stored: Stored) -> None:
        place = self._places[name]
        check_stored(name, stored, place.shape, self._quantizer)
        if place.is_int8 or stored.entry.torch_dtype == place.dtype:
            return
        if not (stored.entry.is_floating and place.dtype.is_floating_point):
            raise CheckpointError(
                f"its dtype is {stored.entry.dtype}, and {name} in the module is {place.dtype}", **stored.entry.location
            )

    def _unexpected(self) -> list[str]:
        belonging = {f"{name}.{leaf}" for name in self._quantizer.converted for leaf in (checks.SCALES, checks.FORMAT)}
        return sorted(set(self._checkpoint) - set(self._places) - belonging)

    def _are_alike(self, one: str, other: str) -> bool:
        dtypes = self._destination(one).dtype, self._destination(other).dtype
        return are_alike(self._checkpoint[one], self._checkpoint[other], dtypes)

    def run(self, request: LoadRequest) -> None:
        """Replaces everything."""
        names = by_turns(self._wanted, lambda name: self._places[name].device)
        wanted = {name: self._wanted[name] for name in names}
        maker = _Maker({name: (stored, self._destination(name)) for name, stored in wanted.items()}, self._assembly)
        self._recorder.expect(sum(request.entry.nbytes for request in maker.requests()))
        replacement = Replacement({name: [self._places[name]] for name in names}, self._require_sound)
        stream = open_stream(
            list(maker.requests()),
            request.options,
            recorder=self._recorder,
            quantizer=find_entry_point(),
            most_bytes=MOST_BYTES,
        )
        with replacement.reported(), stream as maker.stream:
            replacement.run(names, maker)

    @cached_property
    def _assembly(self) -> Assembly:
        return Assembly(self._quantizer, self._recorder)

    def _destination(self, name: str) -> Destination:
        """A value becomes what the module has there; what becomes int8 passes through the checkpoint's own dtype."""
        place: Place = self._places[name]
        dtype = self._checkpoint[name].torch_dtype if place.is_int8 else place.dtype
        return Destination(place.device, dtype)

    def _require_sound(self) -> None:
        self._quantizer.health.raise_or_warn(strict=self._quantizer.strict, locate=self._locate)
        self._checkpoint.require_unchanged(self._checkpoint.files)

    def _locate(self, name: str) -> dict[str, Any]:
        return self._checkpoint[name].location


class _Maker:
    """Makes values of entries that need no conversion (see `replacing.Maker`)."""

    def __init__(self, ways: dict[str, tuple[Stored, Destination]], assembly: Assembly) -> None:
        self._ways = ways
        self._assembly = assembly
        self.stream: TensorStream

    def requests(self) -> Iterator[Any]:
        for name, way in self._ways.items():
            yield from self._assembly.requests(name, *way)

    def make(self, name: str, _: Any) -> dict[str, torch.Tensor]:
        return {name: self._assembly.make(name, *self._ways[name], self.stream)}

    def wait(self, name: str) -> None:
        self.stream.wait(self._entries(name))

    def release(self, name: str) -> None:
        self.stream.release(self._entries(name))

    def _entries(self, name: str) -> list[str]:
        stored, _ = self._ways[name]
        return [entry.name for entry in (stored.layout, stored.scales, stored.entry) if entry is not None]
