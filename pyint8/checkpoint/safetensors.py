"""The header of a safetensors file, validated by the format's own rules.

The rules are those of https://github.com/huggingface/safetensors (README, "Format") and of its parser (0.8): whatever
that parser refuses is refused here. On purpose, more is refused here: duplicate keys at any level (the parser keeps the
last), a header that does not begin with `{` (the README demands it, the parser skips white space), and a tensor or a
dtype written as anything but an object and a string (the parser's generic deserializer also takes arrays and maps).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pyint8.errors import HeaderError, TruncatedError
from pyint8.host import garbage
from pyint8.host.files import open_file

from ._reading import (
    ARCHIVE_PREFIX,
    DOWNLOAD_AGAIN,
    LEGACY_PREFIX,
    LFS_POINTER,
    LFS_PREFIX,
    JsonError,
    abbreviated,
    os_errors,
    parse_json,
)
from .entry import DTYPES, Entry
from .stamp import FileStamp, reading

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format allows, in bytes."""

_LENGTH_BYTES = 8
_U64_MAX = 2**64 - 1
_FIELDS = ("dtype", "shape", "data_offsets")
_BY_PLACE = attrgetter("offset", "nbytes")
_BITS = {name: bits for name, (bits, _) in DTYPES.items()}


@dataclass(frozen=True)
class SafetensorsFile:
    """What the header of one file says.

    Attributes:
        path: The file.
        size: Its length in bytes.
        entries: Its tensors by name, in order of offset.
        metadata: Its `__metadata__`; empty if it has none.
        stamp: Its state when it was read.
    """

    path: str
    size: int
    entries: dict[str, Entry]
    metadata: dict[str, str]
    stamp: FileStamp


def read_header(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Read and validate the header of a safetensors file; no byte of a tensor is read.

    Unknown keys in a tensor's description are ignored and `"__metadata__": null` means none, as in safetensors.

    Args:
        path: The file.

    Returns:
        The tensors with their absolute offsets: without overlap or hole, together the whole data section.

    Raises:
        HeaderError: The header breaks a rule of the format.
        TruncatedError: The file ends before its header or its tensors do.
        CheckpointNotFoundError: There is no such file.
        FileChangedError: The file was written to meanwhile.
        ReadError: The operating system refused to open or read it; `errno` says why.
    """
    with garbage.paused():  # many small objects, none of them garbage: looking takes as long as reading
        return _read_header(os.fspath(path))


def _read_header(path: str) -> SafetensorsFile:
    stamp, raw = _read(path)
    header = _parse(path, raw)
    metadata = _metadata(path, header.pop("__metadata__", None))
    data_start = _LENGTH_BYTES + len(raw)
    entries = [_entry(path, name, info, data_start, stamp) for name, info in header.items()]
    entries.sort(key=_BY_PLACE)
    data_end = _check_cover(path, entries, data_start)
    _check_size(path, entries, data_end, stamp.size)
    return SafetensorsFile(path, stamp.size, {entry.name: entry for entry in entries}, metadata, stamp)


def _read(path: str) -> tuple[FileStamp, bytes]:
    with os_errors(path), open_file(path) as file, reading(path, file) as stamp:
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise TruncatedError(
                f"the file has {len(prefix)} bytes, fewer than the 8 of the header's length; {DOWNLOAD_AGAIN}",
                path=path,
                offset=len(prefix),
            )
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(_not_a_length(prefix, length), path=path, offset=0)
        raw = file.read(min(length, max(0, stamp.size - _LENGTH_BYTES)))
    if len(raw) < length:
        raise TruncatedError(
            f"the header's length is {length}, but the file ends {length - len(raw)} bytes earlier; {DOWNLOAD_AGAIN}",
            path=path,
            offset=_LENGTH_BYTES + len(raw),
        )
    return stamp, raw


def _not_a_length(prefix: bytes, length: int) -> str:
    if prefix == LFS_PREFIX:
        return LFS_POINTER
    if prefix.startswith((ARCHIVE_PREFIX, LEGACY_PREFIX[:_LENGTH_BYTES])):
        return "it is a file of PyTorch's; let its name end in .bin"
    return (
        f"the header's length is {length}, more than the {MAX_HEADER_BYTES} that the format allows, so this is no "
        f"safetensors file or a damaged one; {DOWNLOAD_AGAIN}"
    )


def _parse(path: str, raw: bytes) -> dict[str, object]:
    if not raw.startswith(b"{"):
        raise HeaderError(f"the header does not begin with '{{'; {DOWNLOAD_AGAIN}", path=path, offset=_LENGTH_BYTES)
    try:
        header = parse_json(raw)
    except JsonError as error:
        offset = None if error.position is None else _LENGTH_BYTES + error.position
        raise HeaderError(f"the header: {error}; {DOWNLOAD_AGAIN}", path=path, offset=offset) from None
    assert isinstance(header, dict), "JSON that begins with { is an object"
    return header


def _metadata(path: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise HeaderError(f"__metadata__ is {abbreviated(value)}, not an object; {DOWNLOAD_AGAIN}", path=path)
    for key, text in value.items():
        if not isinstance(text, str):
            raise HeaderError(
                f"__metadata__ has {abbreviated(text)} under {abbreviated(key)}, which must be a string; "
                f"{DOWNLOAD_AGAIN}",
                path=path,
            )
    return value


def _entry(path: str, name: str, info: Any, data_start: int, stamp: FileStamp) -> Entry:
    try:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        bits = _BITS[dtype]
    except (KeyError, TypeError):
        raise _badly_described(path, name, info) from None
    if type(shape) is not list:
        raise _no_shape(path, name, shape)
    numel, is_counted = 1, True
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= _U64_MAX:  # a bool is no number to the format
            raise _no_shape(path, name, shape)
        if is_counted:  # the format checks each step from the left, so an overflow before a 0 is still one
            numel *= dimension
            is_counted = numel <= _U64_MAX
    if type(offsets) is not list or len(offsets) != 2:
        raise _no_offsets(path, name, offsets)
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= _U64_MAX:
        raise _no_offsets(path, name, offsets)
    entry = Entry(name, dtype, tuple(shape), path, data_start + begin, end - begin, stamp=stamp)
    if numel * bits != (end - begin) * 8 or numel * bits > _U64_MAX or not is_counted:
        raise _wrong_size(entry, numel * bits if is_counted else _U64_MAX + 1)
    return entry


def _badly_described(path: str, name: str, info: object) -> HeaderError:
    if not isinstance(info, dict):
        return _broken(path, name, f"is described by {abbreviated(info)}, not by an object")
    if missing := [field for field in _FIELDS if field not in info]:
        return _broken(path, name, f"its description lacks {', '.join(missing)}")
    problem = f"unknown dtype {abbreviated(info['dtype'])}; the format's are {', '.join(DTYPES)}"
    return HeaderError(f"{problem}; save the tensor with one of them", path=path, tensor=name)


def _no_shape(path: str, name: str, shape: object) -> HeaderError:
    return _broken(path, name, f"its shape {abbreviated(shape)} is not a list of non-negative 64-bit integers")


def _no_offsets(path: str, name: str, offsets: object) -> HeaderError:
    problem = f"its data_offsets {abbreviated(offsets)} are not [begin, end] with 0 <= begin <= end"
    return _broken(path, name, problem)


def _wrong_size(entry: Entry, bits: int) -> HeaderError:
    if bits > _U64_MAX:
        problem = "has more elements or bits than 64 bits count"
    elif bits % 8:
        problem = f"is {bits} bits, not whole bytes"
    else:
        problem = f"is {bits // 8} bytes, but its data_offsets span {entry.nbytes}"
    what = f"shape {abbreviated(list(entry.shape))} of {entry.dtype}"
    return _broken(entry.path, entry.name, f"{what} {problem}", entry.offset)


def _check_cover(path: str, entries: list[Entry], data_start: int) -> int:
    end, before = data_start, None
    for entry in entries:
        if entry.offset != end:
            how = "overlaps" if entry.offset < end else f"leaves a hole of {entry.offset - end} bytes after"
            what = "the header" if before is None else f"tensor {before.name!r}"
            raise _broken(path, entry.name, f"{how} {what}, which ends at byte {end}", entry.offset)
        end, before = entry.offset + entry.nbytes, entry
    return end


def _check_size(path: str, entries: list[Entry], data_end: int, size: int) -> None:
    if size > data_end:
        raise HeaderError(
            f"{size - data_end} bytes follow the last tensor, which ends here; {DOWNLOAD_AGAIN}",
            path=path,
            offset=data_end,
        )
    if size < data_end:
        cut = next(entry for entry in entries if entry.offset + entry.nbytes > size)
        raise TruncatedError(
            f"the file ends here, {data_end - size} bytes too early, and this is the first tensor that is cut "
            f"(its bytes are {cut.offset} to {cut.offset + cut.nbytes}); {DOWNLOAD_AGAIN}",
            path=path,
            tensor=cut.name,
            offset=size,
        )


def _broken(path: str, name: str, problem: str, offset: int | None = None) -> HeaderError:
    return HeaderError(f"{problem}; {DOWNLOAD_AGAIN}", path=path, tensor=name, offset=offset)
