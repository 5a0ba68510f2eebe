"""The collectives that ranks need, on a process group of torch.distributed: the only user of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from pyint8.errors import OptionError
from pyint8.host.processes import processes
from pyint8.placement.device_map import is_planned
from pyint8.streaming.first_tensors import first_gpu


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


def _all_gather(found: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 has a new name for it
    gather(found, sent, group=group)


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
        self.size = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)
        self.device: torch.device | None = None
        self.stream = 0

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
                side = torch.cuda.Stream(self.device)
                stack.enter_context(torch.cuda.stream(side))
                self.stream = side.cuda_stream
            yield

    @cached_property
    def _tells_on_cpu(self) -> bool:
        """Whether words go through the CPU: by what the group can, not by the load, which may have failed on a rank."""
        return "cpu" in self._backends()

    @property
    def _telling_device(self) -> torch.device | None:
        return torch.device("cpu") if self._tells_on_cpu else self.device

    def numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers, as many of each, once they are known."""
        sent = torch.tensor(mine, dtype=torch.int64, device=self._telling_device)
        found = torch.empty(self.size * len(mine), dtype=torch.int64, device=self._telling_device)
        _all_gather(found, sent, self._group)
        return found.view(self.size, len(mine)).tolist()

    def messages(self, mine: bytes, lengths: Sequence[int]) -> list[bytes]:
        """Every rank's message; all know all lengths, of which one at least is not 0."""
        longest = max(lengths)
        sent = torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8).to(self._telling_device)
        found = torch.empty(self.size * longest, dtype=torch.uint8, device=self._telling_device)
        _all_gather(found, sent, self._group)
        rows = found.view(self.size, longest).cpu()
        return [bytes(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]

    def gather(self, memory: torch.Tensor, part: int) -> None:
        """Every rank's part of `memory` (uint8) comes to its place in it: in order, `part` bytes each."""
        mine = memory[self.rank * part : (self.rank + 1) * part]
        _all_gather(memory[: self.size * part], mine, self._group)
