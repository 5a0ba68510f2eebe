"""The ranks of a process group that load together, from the first step to the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pyint8.errors import CancelledError, OptionError, RankError
from pyint8.placement.device_map import check_device_map
from pyint8.streaming.lane import LaneOpener, open_lane
from pyint8.streaming.ranks.apart import Apart
from pyint8.streaming.ranks.conductor import Conductor
from pyint8.streaming.ranks.group import Group, check_group, one_device
from pyint8.streaming.ranks.meetings import Meeting
from pyint8.streaming.ranks.transport import SharedTransport

if TYPE_CHECKING:
    from pyint8.config import StreamOptions
    from pyint8.streaming.transport import Transport

_block: ContextVar[Ranks | None] = ContextVar("pyint8_ranks_of_block", default=None)


class Ranks:
    """A load, or a block of several, of all ranks together; a context manager.

    On leaving it all ranks meet. Where one leaves it with an error, all others get a `RankError` that quotes it.

    Args:
        group: What they tell each other by.
    """

    def __init__(self, group: Group) -> None:
        self._conductor = Conductor(group)
        self._group = group
        self._loads = 0

    def use(self, device_map: Any) -> None:
        """Takes the device map of a load, before its first meeting.

        Raises:
            PlacementError: It is no device map.
            OptionError: It is not one device, or none whose memory this group can gather.
        """
        check_device_map(device_map)
        device = one_device(device_map)
        self._group.check_device(device)
        if self._group.device not in (None, device):
            raise OptionError(f"the loads of one block go to one device: this one to {device}, one before to another")
        self._group.device = device

    def transport(self, options: StreamOptions, opener: LaneOpener = open_lane) -> Transport:
        """What moves the bytes of a load."""
        self._loads += 1
        return SharedTransport(self._conductor, self._loads, options, opener)

    @property
    def rank(self) -> int:
        """The number of this one, from 0."""
        return self._group.rank

    @property
    def size(self) -> int:
        return self._group.size

    def meet(self, stage: str, value: Any) -> list[Any]:
        """The values (of JSON's kinds) of all ranks, in order, once they have come to the same stage.

        Raises:
            RankError: Another rank failed, or is at another stage.
        """
        return self._conductor.hold(Meeting(stage, value))

    def apart(self) -> Apart:
        """Around what each rank does by itself."""
        return Apart(self._conductor)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error of this block is known to the others before what is around it ends, and takes away what they use."""
        try:
            yield
        except BaseException as error:
            self._conductor.fail(error)
            raise

    @staticmethod
    def of_block() -> Ranks | None:
        """Those that `together` was given, in this context."""
        return _block.get()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this block, loads of code that knows nothing of ranks are theirs."""
        with self:
            token = _block.set(self)
            try:
                yield
            finally:
                _block.reset(token)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        conductor = self._conductor
        if error is None:
            self._leave_together()
            return
        conductor.fail(error)
        if conductor.verdict not in (None, error) and isinstance(error, Exception):
            raise conductor.verdict from (None if isinstance(error, CancelledError) else error)

    def _leave_together(self) -> None:
        try:
            self._conductor.hold(Meeting("the end", None, is_last=True))
        except RankError:
            raise
        except BaseException as error:  # Ctrl-C, while the others are waited for
            self._conductor.fail(error)
            raise
        finally:
            self._conductor.join()


def join_ranks(process_group: Any) -> Ranks | None:
    """The ranks of a process group; None for a group of one.

    Raises:
        OptionError: It is not a process group, or this process does not belong to it.
    """
    check_group(process_group)
    group = Group(process_group)
    return Ranks(group) if group.size > 1 else None
