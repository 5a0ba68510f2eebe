"""What a conductor has to do beside pieces: to hold meetings, and to gather what a source reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """What reads this rank's parts of bands that are to be gathered by itself, as room becomes free.

    Attributes:
        batch_bytes: Of bands that are gathered at once, but for the last of them: there is room for so many of those
            that were listed together, whatever is between them.
        scratch: What bands pass through, uint8.
    """

    batch_bytes: int
    scratch: torch.Tensor

    def has_more(self) -> bool:
        """Whether there are bands that were not gathered yet."""

    def sizes_ahead(self, skipped: int, most: int) -> list[int]:
        """Bytes of those, but for the first `skipped` of them; `most` at most, one at least if there is one."""

    def await_parts(self, count: int, stream: int, milliseconds: int) -> list[tuple[torch.Tensor, int]] | None:
        """The memory of the next `count` of them, uint8, and how many bytes of each every rank reads.

        This rank's parts are there after what `stream` does. None if that takes longer.
        """

    def gathered(self, count: int, stream: int) -> None:
        """The first `count` are whole after what `stream` does."""


class Meeting:
    """Values of all ranks (of JSON's kinds), once all have come to the same stage.

    Attributes:
        message: This rank's stage and value.
        is_urgent: Whether it need not wait for pieces that were put before it.
        is_last: Whether nothing comes after it.
        check: Called with the values before what was put behind it goes on; raises RankError, on all ranks alike, if
            it shall not.
        values: Every rank's, in order.
    """

    def __init__(
        self,
        stage: str,
        value: Any,
        *,
        is_urgent: bool = False,
        is_last: bool = False,
        check: Callable[[list[Any]], object] = lambda _: None,
    ) -> None:
        self.message = json.dumps([stage, value]).encode()
        self.is_urgent = is_urgent
        self.is_last = is_last
        self.check = check
        self.values: list[Any] | None = None
