"""What a conductor has to do beside pieces: to hold meetings, and to ask for more pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """What asks for the bytes of pieces itself, as room becomes free.

    Attributes:
        batch_bytes: Of pieces that are gathered at once, but for the last of them: there is always room for so many.
        scratch: What pieces pass through, uint8.
    """

    batch_bytes: int
    scratch: torch.Tensor

    def has_more(self) -> bool:
        """Whether there are pieces that were not added yet."""

    def sizes_ahead(self) -> Iterator[int]:
        """Bytes of the pieces that were not added yet, but for those that all ranks read whole."""

    def feed(self) -> None:
        """Adds those for which there is room."""

    def await_room(self) -> None:
        """Waits until there may be more room."""


class Meeting:
    """Values of all ranks (of JSON's kinds), once all have come to the same stage.

    Attributes:
        message: This rank's stage and value.
        is_last: Whether nothing comes after it.
        values: Every rank's, in order.
    """

    def __init__(self, stage: str, value: Any, *, is_last: bool = False) -> None:
        self.message = json.dumps([stage, value]).encode()
        self.is_last = is_last
        self.values: list[Any] | None = None
