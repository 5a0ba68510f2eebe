"""Processes that are ranks of one gloo group, started once, in which many cases run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from forking import LOADING

_TIMEOUT = 120.0
IMPORTED = ["torch.distributed", *LOADING]


@dataclass(frozen=True)
class Outcome:
    """What a case came to on one rank.

    Attributes:
        value: What it returned.
        error: The name of the class of what it raised; None if it returned.
        text: The error's.
        at: When, on the clock that all processes have.
    """

    value: Any = None
    error: str | None = None
    text: str = ""
    at: float = 0.0


def outcome_of(work: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(value=work(), at=time.monotonic())
    except BaseException as error:
        return Outcome(error=type(error).__name__, text=str(error), at=time.monotonic())


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": size}
    launched |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "HF_HUB_OFFLINE": 1}
    os.environ.update({name: str(value) for name, value in launched.items()})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    while (asked := connection.recv()) is not None:
        case, arguments = asked
        connection.send(outcome_of(lambda: case(rank, *arguments)))  # noqa: B023  called at once
    dist.destroy_process_group()
    os._exit(0)  # Python's own end takes seconds


class RankProcesses:
    """A context manager.

    Args:
        size: How many ranks.
        are_forked: From a process that has imported everything once. They have the environment of the first of them.
    """

    def __init__(self, size: int, *, are_forked: bool = False) -> None:
        context = multiprocessing.get_context("forkserver" if are_forked else "spawn")
        context.set_forkserver_preload(IMPORTED)
        port = _free_port()
        self.size = size
        self.processes, self._connections = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Outcome]:
        """What `case(rank, *arguments)` comes to on every rank; it must be importable."""
        for connection in self._connections:
            connection.send((case, arguments))
        return [self._outcome(connection) for connection in self._connections]

    def _outcome(self, connection: Connection) -> Outcome:
        assert connection.poll(_TIMEOUT), "a rank hangs"
        try:
            found: Outcome = connection.recv()
        except EOFError:
            return Outcome(error="gone", at=time.monotonic())
        return found

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            with suppress(OSError):  # of one that is gone
                connection.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
