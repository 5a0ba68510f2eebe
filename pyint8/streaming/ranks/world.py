"""The process group of all processes that a launcher started, for programs that make none themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from pyint8.errors import OptionError
from pyint8.host.processes import processes

_SET_BY_LAUNCHERS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def launched_group() -> Iterator[tuple[Any, int]]:
    """A group (gloo) of all processes that torchrun started with this one, until the block ends, and this one's rank.

    Raises:
        OptionError: They do not know how to reach each other.
    """
    total = processes().total
    missing = [name for name in _SET_BY_LAUNCHERS if name not in os.environ]
    if missing or not dist.is_available():
        raise OptionError(
            f"WORLD_SIZE says that this is one of {total} processes, but {', '.join(missing)} is not set, by which "
            "they reach each other; start them with torchrun, or one of them without WORLD_SIZE"
        )
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD, dist.get_rank()
    finally:
        dist.destroy_process_group()
