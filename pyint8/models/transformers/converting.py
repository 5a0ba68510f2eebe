"""From a checkpoint to its int8 form, a few tensors at a time: the model itself never holds a value of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from pyint8.checkpoint.journal import Journal
from pyint8.checkpoint.shards import shards_of
from pyint8.checkpoint.shards_writer import ShardsWriter
from pyint8.host.ending import submit
from pyint8.models.assembly import Destination
from pyint8.models.checks import FORMAT, SCALES
from pyint8.models.saving import MOST_BYTES, WRITERS, planned
from pyint8.models.transformers.compat import in_conversions, reverted, revertible
from pyint8.models.transformers.planned import PlannedLoad
from pyint8.models.transformers.saving import require_saveable, saved_form
from pyint8.quantizer import int8_modules
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.write_behind import WriteBehind

State = dict[str, torch.Tensor]

# After so many bytes they are brought to the disk and noted there.
_NOTED_BYTES = 1 << 30


class Conversion:
    """What is to be written of a checkpoint, known before a tensor is read.

    Args:
        model: The model, with stand-ins for what the checkpoint has.
        load: Its load.
        max_shard_size: Of one file.
        equal: Whether two tied parameters that the checkpoint has both are the same; None reads them.

    Attributes:
        shards: The files to write.

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
    ) -> None:
        self._model = model
        self._load = load
        _tie(model, load, equal)
        require_saveable(model)
        own: State = model.state_dict()
        self._codes = int8_modules(model)
        belonging = {f"{name}.{leaf}" for name in self._codes for leaf in ("weight", SCALES, FORMAT)}
        self._conversions = revertible(model, belonging)
        self._converted = in_conversions(self._conversions or (), own)
        saved = saved_form(model, own, lambda _, value: value)
        names = {id(value): name for name, value in saved.items()}
        self._names = {name: names[id(value)] for name, value in own.items() if id(value) in names}
        self._initialized = {self._names[name]: value for name, value in own.items() if self._is_initialized(name)}
        self.shards = shards_of((planned(name, value) for name, value in saved.items()), max_shard_size)

    def _is_initialized(self, name: str) -> bool:
        """Whether the checkpoint has no such tensor, but the int8 one will."""
        module, _, leaf = name.rpartition(".")
        made_by = self._load.plan.made_by
        belongs = leaf in (SCALES, FORMAT) and module in self._codes
        return name in self._names and (f"{module}.weight" if belongs else name) not in made_by

    def run(
        self,
        folder: str,
        journal: Journal,
        devices: Sequence[torch.device],
        preparation: Preparation,
        recorder: Recorder,
    ) -> None:
        """Writes the files.

        Args:
            folder: Where to.
            journal: Of what is there already.
            devices: Where weights are quantized.
            preparation: What has begun already.
            recorder: Told of bytes as they land.

        Raises:
            Pyint8Error: A tensor cannot be read, quantized or written.
        """
        names = [name for name in self._load.plan.targets if not self._saved_by(name) <= journal.done]
        destinations = self._destinations(names, devices)
        with ExitStack() as stack:
            writer = stack.enter_context(ShardsWriter(folder, self.shards, journal.done))
            notes = _Notes(journal, writer)
            stack.callback(notes.close)
            behind = stack.enter_context(WriteBehind(WRITERS, MOST_BYTES))
            maker = self._load.maker_of(names, destinations, preparation, recorder, MOST_BYTES)
            stack.callback(maker.close)
            self._write(self._initialized, writer, behind, notes)
            for name in names:
                parts = self._saved_parts(maker.make(name, None))
                maker.wait(name)
                self._write(parts, writer, behind, notes)
                maker.release(name)
            self._load.check_values()
            behind.finish()
            writer.finish()
            writer.write_index({"total_parameters": self._model.num_parameters()})

    def _write(self, parts: State, writer: ShardsWriter, behind: WriteBehind, notes: _Notes) -> None:
        for name, value in parts.items():
            notes.add(name, value.nbytes, behind.put(value, partial(writer.write, name)))
        if notes.are_due:
            self._load.check_values()
            notes.note()

    def _saved_parts(self, made: State) -> State:
        """What is written of a target's parameters, by the checkpoint's names."""
        state = {part: value for name, parameter in made.items() for part, value in self._parts(name, parameter)}
        if self._converted.isdisjoint(state):
            return {self._names[name]: value for name, value in state.items() if name in self._names}
        return {
            name: value
            for name, value in reverted(self._model, state, self._conversions).items()
            if name in self.shards.file_of
        }

    def _parts(self, name: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A parameter as a state dict has it."""
        module = name.removesuffix(".weight")
        yield name, parameter.data
        if module != name and module in self._codes:
            yield f"{module}.{SCALES}", parameter.SCB  # type: ignore[attr-defined]
            yield f"{module}.{FORMAT}", torch.zeros((), dtype=torch.uint8)  # row-major, as bitsandbytes has it

    def _saved_by(self, target: str) -> set[str]:
        """The names of all that is written of a target."""
        return set(self._saved_parts(self._load.stand_ins(target)))

    def _destinations(self, names: Sequence[str], devices: Sequence[torch.device]) -> dict[str, Destination]:
        """Each target's parameters on one device, by turns."""
        dtypes, targets = self._load.dtypes, self._load.plan.targets
        return {
            made: Destination(devices[number % len(devices)], dtypes[made])
            for number, name in enumerate(names)
            for made in targets[name].makes()
            if made in dtypes
        }


class _Notes:
    """Brings what is written to the disk, many tensors at a time, and notes them in the journal; on a thread."""

    def __init__(self, journal: Journal, writer: ShardsWriter) -> None:
        self._journal, self._writer = journal, writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pyint8 journal")
        self._noting: list[Future[None]] = []
        self._names: list[str] = []
        self._writes: list[Future[None]] = []
        self._nbytes = 0

    def add(self, name: str, nbytes: int, write: Future[None]) -> None:
        self._names.append(name)
        self._writes.append(write)
        self._nbytes += nbytes

    @property
    def are_due(self) -> bool:
        return self._nbytes >= _NOTED_BYTES

    def note(self) -> None:
        """Takes it that the values added so far are good.

        Raises:
            WriteError: Of an earlier time.
        """
        for earlier in self._noting:
            if earlier.done():
                earlier.result()
        self._noting.append(submit(self._pool, self._note, self._names, self._writes))
        self._names, self._writes, self._nbytes = [], [], 0

    def _note(self, names: list[str], writes: list[Future[None]]) -> None:
        if all(write.exception() is None for write in writes):  # an error stops everything
            self._writer.sync()
            self._journal.add(names)

    def close(self) -> None:
        """Waits for the thread."""
        self._pool.shutdown()


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
