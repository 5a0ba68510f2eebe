"""The compiled extension, or an error that says how to get it, and its engines, which are closed when Python ends."""

from __future__ import annotations

from contextlib import suppress
from weakref import WeakSet

from pyint8.errors import DeviceError, MissingDependencyError
from pyint8.host import ending

try:
    from pyint8 import _core
except ImportError as error:
    raise MissingDependencyError(
        "pyint8's extension is not built here. Install the package (`pip install .` in its source tree) and, if you "
        f"did, do not run Python inside the source tree, whose pyint8/ folder hides the installed one ({error})."
    ) from error

__all__ = ["_core", "open_engine"]

_engines: WeakSet[_core.Engine] = WeakSet()


def open_engine(
    *, threads: int, slots_per_thread: int, slot_bytes: int, direct_io: bool, timeline: bool = False
) -> _core.Engine:
    """An engine (see `_core.Engine`) that is closed at the latest when Python ends.

    Raises:
        CancelledError: It ends already.
        ReadError: The operating system starts no thread; `errno` says why.
    """
    ending.refuse_at_end()
    engine = _core.Engine(
        threads=threads,
        slots_per_thread=slots_per_thread,
        slot_bytes=slot_bytes,
        direct_io=direct_io,
        timeline=timeline,
    )
    _engines.add(engine)
    return engine


def _close_all() -> None:
    for engine in list(_engines):
        with suppress(DeviceError):  # the driver has ended, too
            engine.close()


ending.stop_at_end(_close_all)
