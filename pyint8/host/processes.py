"""The processes that torchrun (or accelerate) started together with this one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Processes(NamedTuple):
    """What the launcher says.

    Attributes:
        total: How many processes it started, on all hosts; 1 without a launcher.
        on_host: How many of these are on this host.
        local_rank: The number of this one among them, from 0.
    """

    total: int
    on_host: int
    local_rank: int


def processes(environment: Mapping[str, str] | None = None) -> Processes:
    """Reads WORLD_SIZE, LOCAL_WORLD_SIZE and LOCAL_RANK; what is no number counts as not set.

    Args:
        environment: The variables; None for this process's own.
    """
    variables = os.environ if environment is None else environment

    def number(name: str, least: int) -> int:
        text = variables.get(name, "")
        return max(least, int(text)) if text.isdecimal() else least

    return Processes(number("WORLD_SIZE", 1), number("LOCAL_WORLD_SIZE", 1), number("LOCAL_RANK", 0))
