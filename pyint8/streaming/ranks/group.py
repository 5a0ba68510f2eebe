"""The collectives that ranks need, on a process group of torch.distributed: the only user of it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from pyint8.errors import OptionError
from pyint8.host.processes import processes
from pyint8.placement.device_map import is_planned
from pyint8.streaming.first_tensors import first_gpu

_BATCH_BYTES = 256 << 20
_LETTING_GO_SECONDS = 0.5
_LOOK_SECONDS = 0.0002


def check_group(process_group: Any) -> None:
    """Raises OptionError unless it is a process group that this process is a member of."""
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise OptionError(
            f"process_group is {process_group!r}; it must be a torch.distributed.ProcessGroup that this process is a "
            "member of, such as torch.distributed.group.WORLD after init_process_group"
        )


def one_device(device_map: Any) -> torch.device:
    """The device on which tensors land under a map that puts everything on one: a GPU, or the CPU.

    Raises:
        OptionError: It is planned, or names several: each rank loads onto one.
    """
    named = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if is_planned(device_map) or len(named) != 1 or "disk" in named:
        raise OptionError(
            f'device_map is {device_map!r}; with process_group each rank loads onto one device: "cuda" for the GPU of '
            'its LOCAL_RANK, a device, or "cpu"'
        )
    found = first_gpu(device_map)
    return torch.device("cpu") if found is None else found[0]


def _wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + _LETTING_GO_SECONDS
    while not is_so() and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)


def _rows(numbers: torch.Tensor, count: int, wait: Callable[[], object]) -> list[list[int]]:
    wait()
    rows: list[list[int]] = numbers.view(count, -1).tolist()
    return rows


class _Words:
    """Memory for the numbers that ranks tell each other through their GPUs, used again each time.

    Copies between it wait for nothing but what is before them on the stream; from or to memory that is not pinned they
    would wait for all that is gathered.
    """

    def __init__(self, count: int, ranks: int, device: torch.device) -> None:
        self.pinned = torch.empty(count, dtype=torch.int64, pin_memory=True)
        self.sent = torch.empty(count, dtype=torch.int64, device=device)
        self.found = torch.empty(ranks * count, dtype=torch.int64, device=device)
        self.heard = torch.empty(ranks * count, dtype=torch.int64, pin_memory=True)
        self.event = torch.cuda.Event()


class Group:
    """What the ranks of a process group tell and give each other. All of it is collective.

    Args:
        process_group: Of torch.distributed.

    Attributes:
        size: How many ranks there are.
        rank: The number of this one among them.
        device: Whose memory is gathered; None until it is known. To be set before the first collective.
        stream: What is gathered is there after what this stream of the device does (an integer, as the engine has it).
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._group = process_group
        self._given: dict[int, weakref.ref[torch.Tensor]] = {}  # what the backend's threads may still have
        self._side: torch.cuda.Stream | None = None
        self._words: _Words | None = None
        self.size = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)
        self.device: torch.device | None = None
        self.stream = 0

    @property
    def batch_bytes(self) -> int:
        """Of what has memory of its own, how much is gathered at once. On the CPU gloo copies all that is."""
        return 0 if self.device is None or self.device.type == "cpu" else _BATCH_BYTES

    def leave(self) -> None:
        """Lets go of the process group, once its threads have let go of the last tensors that they were given.

        One of gloo's that does so only while the process exits would abort it.
        """
        _wait_until(lambda: not self._given)
        self._words = None
        del self._group

    def settle(self) -> None:
        """Waits until the device has done what it was given, so that the memory that it writes to may go.

        Not for ever: where a rank is gone, nothing of it gets done. And a device that has failed does nothing more.
        """
        if self._side is not None:
            with suppress(RuntimeError):
                _wait_until(self._side.query)

    def check_device(self, device: torch.device) -> None:
        """Raises OptionError where the group's backend cannot gather a device's memory."""
        backends = self._backends()
        backend, wanted = backends.get(device.type), "nccl" if device.type == "cuda" else "gloo"
        if backend is None or (device.type == "cuda" and backend != wanted):
            served = ", ".join(f"{kind} by {name}" for kind, name in backends.items())
            raise OptionError(
                f"this process group cannot gather memory of {device} (it serves {served}); make one with the backend "
                f"{wanted}"
            )
        bound = self._bound_device()
        if device.type == "cuda" and bound not in (None, device):
            raise OptionError(f"the device map says {device}, but this process group is bound to {bound}")

    def _backends(self) -> dict[str, str]:
        """By kind of device."""
        pairs = (pair.split(":") for pair in dist.get_backend_config(self._group).split(","))
        return {pair[0]: pair[-1] for pair in pairs}

    def _bound_device(self) -> torch.device | None:
        return getattr(self._group, "bound_device_id", None)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The calling thread's collectives are put on a stream of their own, of the right GPU."""
        if self.device is None:  # nothing was loaded
            gpu = self._bound_device() or torch.device("cuda", processes().local_rank)
            self.device = torch.device("cpu") if self._tells_on_cpu else gpu
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
                self._side = torch.cuda.Stream(self.device)
                stack.enter_context(torch.cuda.stream(self._side))
                self.stream = self._side.cuda_stream
            yield

    @cached_property
    def _tells_on_cpu(self) -> bool:
        """Whether words go through the CPU: by what the group can, not by the load, which may have failed on a rank."""
        return "cpu" in self._backends()

    @property
    def _telling_device(self) -> torch.device | None:
        return torch.device("cpu") if self._tells_on_cpu else self.device

    def tell(self, mine: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Begins to tell all ranks some numbers, as many on each and each time; what it returns waits for those of all.

        What is gathered meanwhile comes behind them. One at a time.
        """
        if self._tells_on_cpu:
            sent = torch.tensor(mine, dtype=torch.int64)
            found = torch.empty(self.size * len(mine), dtype=torch.int64)
            work = self._all_gather(found, sent, async_op=True)
            return lambda: _rows(found, self.size, wait=work.wait)
        assert self.device is not None
        self._words = self._words or _Words(len(mine), self.size, self.device)
        words = self._words
        words.pinned.numpy()[:] = mine
        words.sent.copy_(words.pinned, non_blocking=True)
        self._all_gather(words.found, words.sent)
        words.heard.copy_(words.found, non_blocking=True)
        words.event.record()
        return lambda: _rows(words.heard, self.size, wait=words.event.synchronize)

    def messages(self, mine: bytes, lengths: Sequence[int]) -> list[bytes]:
        """Every rank's message; all know all lengths, of which one at least is not 0."""
        longest = max(lengths)
        sent = torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8).to(self._telling_device)
        found = torch.empty(self.size * longest, dtype=torch.uint8, device=self._telling_device)
        self._all_gather(found, sent)
        rows = found.view(self.size, longest).cpu()
        return [bytes(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]

    def gather(self, pieces: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Of each memory (uint8) every rank's part comes to its place in it: in order, so many bytes each."""
        found = [memory[: self.size * part] for memory, part in pieces]
        sent = [self.part_of(memory, part) for memory, part in pieces]
        self._note(*found, *sent)
        self._group.allgather_into_tensor_coalesced(found, sent).wait()

    def _all_gather(self, found: torch.Tensor, sent: torch.Tensor, *, async_op: bool = False) -> Any:
        self._note(found, sent)
        # torch 2.13 has a new name for it
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return gather(found, sent, group=self._group, async_op=async_op)

    def _note(self, *tensors: torch.Tensor) -> None:
        if tensors[0].device.type == "cpu":
            # None is looked at, nor compared: a weak reference to what a thread is letting go may give a ruin of it.
            given = self._given
            references = [weakref.ref(tensor, lambda gone: given.pop(id(gone), None)) for tensor in tensors]
            given.update((id(reference), reference) for reference in references)

    def part_of(self, memory: torch.Tensor, part: int) -> torch.Tensor:
        """This rank's."""
        return memory[self.rank * part : (self.rank + 1) * part]
