"""Reading and parsing what may be damaged or hostile."""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from pyint8.errors import CheckpointNotFoundError, Pyint8Error, ReadError

MAX_DEPTH = 127
"""The deepest nesting of JSON that safetensors' own parser (serde_json) follows."""

DOWNLOAD_AGAIN = "download the file again, or save it again with safetensors"

ARCHIVE_PREFIX = b"PK\x03\x04"
"""What a zip archive begins with, so what torch.save writes, and each record in it."""

LEGACY_PREFIX = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""What torch.save wrote first before torch 1.6: a pickled number."""

LFS_PREFIX = b"version "
LFS_POINTER = "this is text, probably a Git LFS pointer instead of the file; run `git lfs pull`"

_ADVICE = {
    errno.EACCES: "give this user permission to read it",
    errno.EPERM: "give this user permission to read it",
    errno.EAGAIN: "another program holds the file for itself; let it end",
    errno.EISDIR: "give the path of a file",
    errno.ENXIO: "give the path of a file",
    errno.EMFILE: "close files or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close files or raise the limit of open files (ulimit -n)",
}

_ABBREVIATION = reprlib.Repr()
_ABBREVIATION.maxstring = 200


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn the operating system's errors about `path` into `CheckpointNotFoundError` or `ReadError` with its errno."""
    try:
        yield
    except Pyint8Error:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError("there is no such file or folder; check the path", path=path) from error
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk, then try again")
        raise ReadError(f"cannot be read: {error.strerror or error}; {advice}", path=path, errno=error.errno) from error
    except ValueError as error:
        if _can_be_a_name(path):
            raise
        raise CheckpointNotFoundError(f"no file can have the name {path!r} ({error}); correct it") from error


def _can_be_a_name(path: str) -> bool:
    """Not with NUL, or half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


_DIGITS_AS_0 = bytes.maketrans(b"123456789", b"000000000")
_NOT_NESTING = bytes(set(range(256)) - set(b'[]{}"'))
_SHALLOW = 4
_CONTAINERS = frozenset((dict, list))


class JsonError(ValueError):
    """What is wrong with a JSON text, and at which byte (None if unknown)."""

    def __init__(self, problem: str, position: int | None = None) -> None:
        super().__init__(problem)
        self.position = position


def parse_json(raw: bytes) -> object:
    """Parse UTF-8 JSON, refusing all that serde_json (so safetensors) refuses, and duplicate keys at every level.

    Beyond what Python's parser accepts, refused are: NaN, infinities, numbers beyond float64, lone surrogates, nesting
    deeper than `MAX_DEPTH`. "-0" and integers of more than 20 characters become floats, as in serde_json.

    Raises:
        JsonError: The text breaks a rule.
    """
    text = ""
    try:
        text = raw.decode("utf-8")
        integer = _integer if _has_odd_integers(raw) else None  # a function for each number takes half of the time
        value: object = json.loads(
            text, object_pairs_hook=_unique, parse_int=integer, parse_float=_finite, parse_constant=_no_constant
        )
        if not _is_shallow(raw) and _too_deep(value):
            raise RecursionError
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise JsonError(f"JSON nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise JsonError("not UTF-8", error.start) from None
    except UnicodeEncodeError:
        raise JsonError("not valid JSON: half of a surrogate pair in a string") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"not valid JSON: {error.msg}", len(text[: error.pos].encode("utf-8"))) from None
    return value


def abbreviated(value: object) -> str:
    """A value from a hostile file, for a message: never longer than a line."""
    return _ABBREVIATION.repr(value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {abbreviated(key)} appears twice in one object")
            seen.add(key)
    return made


def _has_odd_integers(raw: bytes) -> bool:
    """Whether there may be integers that become floats."""
    return b"-0" in raw or b"0" * 20 in raw.translate(_DIGITS_AS_0)


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= 20 and text != "-0" else _finite(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"not valid JSON: the number {abbreviated(text)} is out of range")
    return value


def _no_constant(text: str) -> object:
    raise JsonError(f"not valid JSON: {text} is not a JSON value")


def _is_shallow(raw: bytes) -> bool:
    """Whether JSON is certainly nested no deeper than a header or an index is; what the text alone shows."""
    if b"\\" in raw:  # where strings end is not as easy to see then
        return False
    left = raw.translate(None, _NOT_NESTING).replace(b'""', b"")
    for _ in range(_SHALLOW):
        left = left.replace(b"[]", b"").replace(b"{}", b"")
    return not left  # quotation marks are left around brackets that are in a string


def _too_deep(value: object) -> bool:
    containers = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        below = (each.values() if type(each) is dict else each for each in containers)
        holding = [children for children in below if not _CONTAINERS.isdisjoint(map(type, children))]
        containers = [child for children in holding for child in children if type(child) in _CONTAINERS]
        if not containers:
            return False
    return True
