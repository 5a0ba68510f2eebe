"""What can go wrong, by kind.

Every error raised on purpose by pyint8 is a `Pyint8Error`. Each kind also derives from the builtin a caller would
expect (`ValueError`, `OSError`, …), so code that never heard of pyint8 can still catch it. Every error has `path`,
`tensor` and `offset` as attributes, None where they do not apply, and says them in its message.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def first_names(names: Sequence[str], at_most: int = 3) -> str:
    """The first names, and how many more there are, for messages: "a, b and 7 more"."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


class Pyint8Error(Exception):
    """The base of every error of this library.

    Args:
        problem: What is wrong, and what to do about it.
        path: The file, if one is at fault.
        tensor: The tensor's name in the checkpoint (or in the model), if one is at fault.
        offset: Where in the file, in bytes from its start.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path: str | None = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.offset = offset

    def __str__(self) -> str:
        place = []
        if self.tensor is not None:
            place.append(f"tensor {self.tensor!r}")
        if self.path is not None:
            place.append(self.path)
        if self.offset is not None:
            place.append(f"byte {self.offset}")
        return f"{', '.join(place)}: {self.problem}" if place else self.problem

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.problem, self.path, self.tensor, self.offset)


def _rebuild(
    kind: type[Pyint8Error], problem: str, path: str | None, tensor: str | None, offset: int | None
) -> Pyint8Error:
    return kind(problem, path=path, tensor=tensor, offset=offset)


class OptionError(Pyint8Error, ValueError):
    """An argument or a `PYINT8_*` environment variable has a value that cannot be used."""


class EnvironmentNotSupportedError(Pyint8Error, RuntimeError):
    """This machine has no device that bitsandbytes can quantize on."""


class MissingDependencyError(Pyint8Error, ImportError):
    """A required package is absent, or the compiled extension was not built."""


class DependencyVersionError(Pyint8Error, ValueError):
    """A required package is too old."""


class ModelNotSupportedError(Pyint8Error, ValueError):
    """The model's class or configuration is unknown, or its checkpoint is quantized by another method."""


class PlacementError(Pyint8Error, ValueError):
    """A device map that cannot be followed."""


class CheckpointError(Pyint8Error, ValueError):
    """The checkpoint's files are not what their format, their index or the model demands."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A folder without a checkpoint, or an index that names a shard which is not there."""

    __str__ = Pyint8Error.__str__


class HeaderError(CheckpointError):
    """A safetensors header that breaks a rule of the format."""


class TruncatedError(CheckpointError):
    """A file that ends before the tensors its header promises."""


class ChecksumError(CheckpointError):
    """A tensor whose bytes are not those that were saved: a disk, a network or memory has damaged them."""


class FileChangedError(CheckpointError):
    """A file that was replaced, or written to, after its header was read and before its tensors were."""


class ShapeMismatchError(CheckpointError):
    """A tensor whose shape is not that of its parameter."""


class QuantizationStateError(CheckpointError):
    """A pre-quantized weight without its scales (`SCB`), or not of dtype int8."""


class NonFiniteWeightError(CheckpointError):
    """NaN or infinity in a weight, or a value that float16 cannot hold."""


class _RefusedError(Pyint8Error, OSError):
    """The operating system refused something; `errno` says why."""

    # Twice: type checkers know no shorter way to say "the base's keywords and one more".
    def __init__(
        self,
        problem: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(problem, path=path, tensor=tensor, offset=offset)
        self.errno = errno

    __str__ = Pyint8Error.__str__

    def __reduce__(self) -> Any:
        return _rebuild_refused, (type(self), self.problem, self.path, self.tensor, self.offset, self.errno)


def _rebuild_refused(kind: type[_RefusedError], *state: Any) -> _RefusedError:
    problem, path, tensor, offset, errno = state
    return kind(problem, path=path, tensor=tensor, offset=offset, errno=errno)


class ReadError(_RefusedError):
    """The operating system refused to open or read a file, or what that takes (a thread, memory); `errno` says why."""


class RemoteError(ReadError):
    """An object store or a web server refused, failed, or was silent; `path` is the URL, `errno` the nearest kind."""


class WriteError(_RefusedError):
    """The operating system refused to write a file, such as on a full disk; `errno` says why."""


class DeviceError(Pyint8Error, RuntimeError):
    """The GPU's driver is absent, too old, or refused a call."""


class CancelledError(Pyint8Error, RuntimeError):
    """The stream was closed while a tensor was waited for."""


class RankError(Pyint8Error, RuntimeError):
    """Another rank of the process group failed, or the ranks do not load the same; no rank has a model.

    Attributes:
        rank: The one that failed first, by its number in the group; None where it is not one alone.
        kind: The name of the class of its error.
    """

    def __init__(self, problem: str, *, rank: int | None = None, kind: str | None = None, **place: Any) -> None:
        super().__init__(problem, **place)
        self.rank = rank
        self.kind = kind

    def __reduce__(self) -> Any:
        return _rebuild_of_rank, (self.problem, self.path, self.tensor, self.offset, self.rank, self.kind)


def _rebuild_of_rank(*state: Any) -> RankError:
    problem, path, tensor, offset, rank, kind = state
    return RankError(problem, path=path, tensor=tensor, offset=offset, rank=rank, kind=kind)


class PartlyReplacedError(Pyint8Error, RuntimeError):
    """A reload stopped halfway; its cause is `__cause__`.

    Attributes:
        replaced: The model's tensors that have their new values, by name; the others have those that they had.
        torn: The one that was being written, which may have some of both; None if there is none.
    """

    def __init__(
        self,
        problem: str,
        *,
        replaced: Sequence[str] = (),
        torn: str | None = None,
        **place: Any,
    ) -> None:
        super().__init__(problem, **place)
        self.replaced = tuple(replaced)
        self.torn = torn

    def __reduce__(self) -> Any:
        state = self.problem, self.path, self.tensor, self.offset, self.replaced, self.torn
        return _rebuild_partly_replaced, state


def _rebuild_partly_replaced(*state: Any) -> PartlyReplacedError:
    problem, path, tensor, offset, replaced, torn = state
    return PartlyReplacedError(problem, path=path, tensor=tensor, offset=offset, replaced=replaced, torn=torn)


_FROM_CORE: dict[str, type[Pyint8Error]] = {
    "invalid_argument": OptionError,
    "driver": DeviceError,
    "cancelled": CancelledError,
}


def from_core(code: str, message: str, path: str, offset: int | None, errno: int) -> Pyint8Error:
    """Build the Python error of an error of the extension, which calls it, or of what ranks find of its sums."""
    if code == "io":
        return ReadError(message, path=path or None, offset=offset, errno=errno or None)
    if code == "truncated":
        return TruncatedError(message, path=path or None, offset=offset)
    if code == "changed":
        return FileChangedError(message, path=path or None, offset=offset)
    if code == "damaged":
        advice = "copy or download the file again; if it was changed on purpose, remove the checksums beside it"
        return ChecksumError(f"{message}: {advice}", path=path or None, offset=offset)
    return _FROM_CORE.get(code, Pyint8Error)(message)
