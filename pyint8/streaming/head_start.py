"""A head start: the engine is opened and the first tensors are read while the model is still being built."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from pyint8.checkpoint import EntryInMemory
from pyint8.streaming.caller import as_caller
from pyint8.streaming.early import EarlyTensor, ask_early
from pyint8.streaming.guessed_pours import GuessedPours
from pyint8.streaming.lane import Lane, LaneOpener, open_lane, reserve_memory
from pyint8.streaming.naming import naming_tensors
from pyint8.streaming.transport import Transport

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.config import StreamOptions
    from pyint8.streaming.guesses import Guessed
    from pyint8.streaming.pour import Pour
    from pyint8.streaming.ranks.ranks import Ranks
    from pyint8.streaming.requests import TensorRequest

logger = logging.getLogger(__name__)

# Smaller tensors are asked for later, together: they would take longer to ask for than to read.
_WORTHWHILE_BYTES = 1 << 20
# So many tensors are asked for before memory is taken for all others.
_FIRST_ASKED = 64


@dataclass(frozen=True)
class FirstTensors:
    """What one device begins with.

    Attributes:
        device: A CUDA device that tensors will land on.
        entries: Those that will go there, or are likely to, in the order they will be asked for.
        nbytes: How much memory of the device they may take.
        reserved: How much memory the load will need at least: torch's allocator is given that much at once, for the
            first tensors and what is made of them.
        if_free: Asks for tensors only if so much memory of the device is free.
        guess: Finds requests whose results are made at once.
        otherwise: What to begin with where there is no room, or nothing can be guessed.
    """

    device: torch.device
    entries: Sequence[Entry] = ()
    nbytes: int = 0
    reserved: int = 0
    if_free: int = 0
    guess: Callable[[], Guessed] | None = None
    otherwise: Callable[[], FirstTensors] | None = None


class Begun(NamedTuple):
    """What a load takes over.

    Attributes:
        transport: Now the caller's to close.
        early: By name the tensors that are under way.
        pours: By device what makes the results of requests that are under way; to be closed after the transport.
    """

    transport: Transport
    early: dict[str, EarlyTensor]
    pours: Mapping[torch.device, Pour] = MappingProxyType({})


class HeadStart:
    """Opens an engine, pins its memory and, once it is told of them, asks for the first tensors: in threads.

    Args:
        devices: Those that it opens lanes of.
        options: How to move bytes.
        gpus: How many GPUs tensors may land on.
        opener: Makes the lane of a device (another one for tests).
        ranks: Those that load together.

    Attributes:
        reserves: Whether it reserved the device's memory; known once its transport is taken.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        options: StreamOptions,
        *,
        gpus: int = 1,
        opener: LaneOpener = open_lane,
        ranks: Ranks | None = None,
    ) -> None:
        self._error: BaseException | None = None
        self._early: dict[str, EarlyTensor] = {}
        self._open_another = partial(Transport, options, opener, gpus)
        self._transport = self._open_another() if ranks is None else ranks.transport(options, opener)
        self._guessed = GuessedPours(self._transport)
        self._is_alone = ranks is None
        self._taken = False
        self.reserves = False
        self._has_context = torch.cuda.is_initialized()
        self._as_caller = as_caller(devices if self._has_context else ())
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._start(lambda: list(map(self._open, devices)))

    def begin(self, parts: Sequence[FirstTensors]) -> None:
        """Asks for what each device begins with; called once, for some or all of the devices.

        Where requests are guessed it returns once they are begun: the bus has little to do until then, and the thread
        that builds the model would take the interpreter's lock for half of the time.
        """
        guesses = any(part.guess is not None for part in parts)
        begun = threading.Event()
        if self._start(lambda: self._begin(parts, begun), begun) and guesses and self._has_context:
            begun.wait()

    def _start(self, work: Callable[[], object], ended: threading.Event | None = None) -> bool:
        """Has a thread do `work`, behind what was begun before; `ended` is set at the end. False without a thread.

        Ranks do it without one, too: they meet over what they begin with.
        """
        before = self._threads[-1] if self._threads else None
        thread = threading.Thread(target=self._run, args=(work, before, ended), name="pyint8 head start")
        self._threads.append(thread)  # first: Ctrl-C may come once it runs
        try:
            thread.start()
        except RuntimeError:  # no more threads: the load then asks for everything itself
            self._threads.pop()
            if not self._is_alone:
                self._run(work, before, ended)
            return False
        return True

    def take(self, wanted: Iterable[TensorRequest] = ()) -> Begun:
        """What is under way, as far as it is of use: all of it, or nothing where it is not what is wanted.

        Args:
            wanted: What the plan of the load asks for.

        Raises:
            FileChangedError: A file is not the one whose header was read.
            ReadError: A file cannot be opened.
            DeviceError: The driver refuses, or memory cannot be pinned.
        """
        self._join()
        if self._error is not None:
            self._transport.close()
            raise self._error
        if not self._guessed.are_right(wanted):
            logger.info("what was begun of experts is not what the model needs: all is read again")
            self._discard()
            in_vain = self._transport.stats()
            self._transport = self._open_another()
            self._transport.before = in_vain
        self._taken = True
        early, self._early = self._early, {}
        pours, self._guessed.by_device = self._guessed.by_device, {}
        return Begun(self._transport, early, pours)

    def _discard(self) -> None:
        self._transport.close()
        self._guessed.close()
        self._early.clear()

    def close(self) -> None:
        """Discards everything, unless a load has taken it. Idempotent."""
        self._is_closed = True
        self._join()
        if not self._taken:
            self._discard()
        self._error = None  # breaks a reference cycle; what it was of may have been written to until now

    def _join(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:  # Ctrl-C may have kept it from starting
                thread.join()

    def _run(self, work: Callable[[], object], before: threading.Thread | None, ended: threading.Event | None) -> None:
        try:
            if before is not None:
                before.join()
            if self._error is None and not self._is_closed:
                with self._as_caller():
                    work()
        except BaseException as error:  # for whoever takes it
            self._error = error
        finally:
            if ended is not None:
                ended.set()

    def _open(self, device: torch.device) -> None:
        lane = self._transport.lane(device)
        if lane.device == device:
            self._transport.engine.prepare(lane.index)

    def _begin(self, parts: Sequence[FirstTensors], begun: threading.Event) -> None:
        """Each device's few first tensors before the others: to take memory for thousands takes a while. Sets `begun`
        once all is but written down."""
        others: list[tuple[Lane, FirstTensors, list[Entry]]] = []
        for part in parts:
            lane = self._transport.lane(part.device)
            if lane.device != part.device or not (part.entries or part.guess):
                continue
            has_room = _has_room(part, lane)
            if not has_room and part.otherwise is not None:
                begun.set()
                part = part.otherwise()
                has_room = _has_room(part, lane)
            entries: list[Entry] = []
            if has_room:
                self.reserves = part.reserved > 0
                entries = _worthwhile(part.entries, part.nbytes)
            few = _FIRST_ASKED if self._is_alone else len(entries)  # ranks agree once, while nothing is gathered yet
            if self._ask_for(lane, entries[:few]) and has_room:
                others.append((lane, part, entries[few:]))
        for lane, part, rest in others:
            if (not rest or self._ask_for(lane, rest)) and part.guess is not None:
                self._make(lane, part, part.guess, begun)
        self._guessed.ask(begun)

    def _make(self, lane: Lane, part: FirstTensors, guess: Callable[[], Guessed], begun: threading.Event) -> None:
        """Has the results of guessed requests made; where that cannot be done, asks for what is to be early instead."""
        if (self._is_alone and self._guessed.open(lane, guess())) or part.otherwise is None:
            return
        begun.set()
        other = part.otherwise()
        entries = [entry for entry in other.entries if entry.name not in self._early]
        self._ask_for(lane, _worthwhile(entries, other.nbytes - part.nbytes))

    def _ask_for(self, lane: Lane, entries: Sequence[Entry]) -> bool:
        """Asks for those that there is memory for, on all ranks; returns whether those are all."""
        wanted = _allocated(lane, entries)
        with naming_tensors(lambda: entries):
            asked = ask_early(self._transport, lane, wanted)
        self._early.update((tensor.entry.name, tensor) for tensor in asked)
        return len(asked) == len(entries)


def _worthwhile(entries: Sequence[Entry], nbytes: int) -> list[Entry]:
    """The first entries that take `nbytes` together, but for small ones, and such as are in memory already."""
    wanted: list[Entry] = []
    for entry in entries:
        if entry.nbytes < _WORTHWHILE_BYTES or isinstance(entry, EntryInMemory):
            continue
        nbytes -= entry.nbytes
        if nbytes < 0:
            break
        wanted.append(entry)
    return wanted


def _allocated(lane: Lane, entries: Sequence[Entry]) -> list[tuple[Entry, torch.UntypedStorage]]:
    """The first entries that there is memory for, with storages: allocating a tensor releases the interpreter's lock,
    and the thread that builds the model would take it each time (docs/performance.md, "The interpreter's lock")."""
    wanted: list[tuple[Entry, torch.UntypedStorage]] = []
    with suppress(torch.OutOfMemoryError):  # the load itself may get by with less at a time
        wanted.extend((entry, torch.UntypedStorage(entry.nbytes, device=lane.device)) for entry in entries)
    return wanted


def _has_room(part: FirstTensors, lane: Lane) -> bool:
    """Whether the device's memory is enough, and torch's allocator has, or was given, what is to be reserved."""
    if part.device.type != "cuda":
        return True
    held = torch.cuda.memory_reserved(part.device) - torch.cuda.memory_allocated(part.device)
    scratch = lane.scratch_bytes if part.if_free and part.guess else 0  # is taken at once
    if torch.cuda.mem_get_info(part.device)[0] + held < part.if_free + scratch:
        return False
    return reserve_memory(part.device, part.reserved)
