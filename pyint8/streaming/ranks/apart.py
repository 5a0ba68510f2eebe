"""Work of which each rank does a part by itself: they meet again and again, and soon hear of one that failed."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from pyint8.errors import CancelledError, Pyint8Error
from pyint8.streaming.ranks.meetings import Meeting

if TYPE_CHECKING:
    from pyint8.streaming.ranks.conductor import Conductor

# How long one may go on after another has failed, and what it costs: a round of a few bytes.
_SECONDS_BETWEEN = 0.3


class Apart:
    """A context manager around a rank's part; all have as many of them, one after the other.

    Args:
        conductor: Holds the meetings, on which no other are held meanwhile.
    """

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._is_done = threading.Event()
        self._has_left = False
        self._are_all_done = False
        # After an error nobody waits for it: it ends with the conductor.
        self._thread = threading.Thread(target=self._run, name="pyint8 ranks apart", daemon=True)

    def check(self) -> None:
        """Raises RankError if another rank has failed, or cannot be reached."""
        if self._conductor.verdict is not None:
            raise self._conductor.verdict

    def finish(self) -> None:
        """Returns once all ranks have come here.

        Raises:
            RankError: One did not.
        """
        self._is_done.set()
        self._thread.join()
        self.check()
        if not self._are_all_done:
            raise CancelledError("the ranks are done")

    def __enter__(self) -> Apart:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._has_left = True
        self._is_done.set()

    def _run(self) -> None:
        with suppress(Pyint8Error):  # which `check` raises, and whoever tells the others of an error
            while not (self._are_all_done or self._has_left):
                self._are_all_done = all(self._conductor.hold(Meeting("work apart", self._is_done.is_set())))
                self._is_done.wait(_SECONDS_BETWEEN)
