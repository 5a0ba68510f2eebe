"""What a checkpoint of whatever bytes may become: what its format's own reader makes of it, or an error of ours.

Each judge takes bytes, as a fuzzer makes them, and says whether they are taken. It fails an assertion if the code under
test is laxer than its peer, brings other bytes, or raises anything but a `Pyint8Error` with the file's path.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import safetensors
import torch
from safetensors_bytes import framed, write

from pyint8.checkpoint import Entry, EntryInMemory, open_checkpoint, read_header, read_pickled
from pyint8.errors import CheckpointError, Pyint8Error, ReadError

# What read_header refuses and safetensors does not, documented in pyint8/checkpoint/safetensors.py.
DELIBERATE = re.compile(r"appears twice|does not begin with|is described by \[|unknown dtype \{")
Result = TypeVar("Result")

MOST_ELEMENTS = 100_000
"""Of tensors whose values are compared: a stride of 0 makes a large one of few bytes."""


def bytes_at(entry: Entry) -> bytes:
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def attempted(action: Callable[[], Result]) -> Result | Pyint8Error:
    """What it returns, or our error about the checkpoint."""
    try:
        return action()
    except (CheckpointError, ReadError) as error:
        return error


# --- safetensors ------------------------------------------------------------------------------------------------------

Judged = tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]


def peer(path: str) -> Judged | None:
    """What safetensors says of a file: (tensors, metadata), or None if it refuses."""
    with open(path, "rb") as file:
        raw = file.read()
    try:
        with safetensors.safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            metadata = opened.metadata() or {}
        data = dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError:
        return None
    tensors = {name: (s.get_dtype(), tuple(s.get_shape()), bytes(data[name]["data"])) for name, s in slices.items()}
    return tensors, metadata


def ours(path: str) -> Judged | Pyint8Error:
    """What read_header says of it, in the same form, or the error."""
    file = attempted(lambda: read_header(path))
    if isinstance(file, Pyint8Error):
        return file
    return {name: (entry.dtype, entry.shape, bytes_at(entry)) for name, entry in file.entries.items()}, file.metadata


def compare(path: str) -> bool:
    """Whether it is taken."""
    expected, actual = peer(path), ours(path)
    if isinstance(actual, Exception):
        assert path in str(actual)
        assert expected is None or DELIBERATE.search(str(actual)), actual
        return False
    assert actual == expected
    return True


def header(raw: bytes, folder: Path) -> bool:
    """Of a whole safetensors file."""
    path = str(folder / "w.safetensors")
    write(path, raw)
    return compare(path)


# --- an index ---------------------------------------------------------------------------------------------------------

SHARDS = {"a.safetensors": ("x", "y"), "b.safetensors": ("z", "x")}


def index(raw: bytes, folder: Path) -> bool:
    """Of an index's JSON, beside two shards that both have an "x"."""
    for shard, names in SHARDS.items():
        described = {n: {"dtype": "U8", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]} for i, n in enumerate(names)}
        write(str(folder / shard), framed(described, b"abcd"))
    path = folder / "model.safetensors.index.json"
    write(str(path), raw)
    found = attempted(lambda: open_checkpoint(path))
    if isinstance(found, Pyint8Error):
        assert str(folder) in str(found)
        assert not is_plain_index(raw), found
        return False
    _judge_index(json.loads(raw)["weight_map"], found, folder)
    return True


def _judge_index(weight_map: dict[str, str], found: Any, folder: Path) -> None:
    assert set(weight_map.values()) <= SHARDS.keys()
    assert {Path(path).parent for path in found.files} <= {folder}
    for name, entry in found.items():
        assert name in SHARDS[Path(entry.path).name]
        assert bytes_at(entry) == (b"ab", b"cd")[SHARDS[Path(entry.path).name].index(name)]
    disagreeing = {each.name for each in found.disagreements}
    for name, shard in weight_map.items():
        assert name in disagreeing or Path(found[name].path).name == shard


def is_plain_index(raw: bytes) -> bool:
    """Whether nobody could find anything wrong with it: what transformers writes."""
    try:
        value = json.loads(raw)
    except ValueError:
        return False
    if not isinstance(value, dict) or value.keys() != {"metadata", "weight_map"} or value["metadata"] != {}:
        return False
    written = json.dumps(value).encode()
    shards = value["weight_map"] if isinstance(value["weight_map"], dict) else {}
    return written == raw and bool(shards) and set(map(str, shards.values())) <= SHARDS.keys()


# --- PyTorch's archives -----------------------------------------------------------------------------------------------


def archive(raw: bytes, folder: Path) -> bool:
    """Of a whole file that torch.save may have written."""
    path = folder / "w.bin"
    path.write_bytes(raw)
    mine = attempted(lambda: read_pickled(path).entries)
    if isinstance(mine, Pyint8Error):
        assert mine.path == str(path)
        return False
    theirs = torch_load(path)
    if any(record.external_attr & 0x10 for record in records(path)):
        return True  # of records that say they are folders, torch gives memory that nobody has written to
    assert isinstance(theirs, dict), theirs
    tensors = {name: value for name, value in theirs.items() if isinstance(value, torch.Tensor)}
    assert mine.keys() == tensors.keys()
    for name, entry in mine.items():
        assert_same(entry, tensors[name])
    return True


def records(path: Path) -> list[zipfile.ZipInfo]:
    """Of an archive; none of what is not one, or only seems so from behind."""
    try:
        return zipfile.ZipFile(path).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return []


def pickled(raw: bytes, folder: Path) -> bool:
    """Of the pickle in an archive whose records are sound: two storages, of 64 and of 24 bytes."""
    content = io.BytesIO()
    records = {"data.pkl": raw, "byteorder": b"little", "version": b"3\n", "data/0": STORAGES[0], "data/1": STORAGES[1]}
    with zipfile.ZipFile(content, "w") as written:
        for name, record in records.items():
            written.writestr(f"w/{name}", record)
    return archive(content.getvalue(), folder)


STORAGES = (bytes(range(64)), bytes(range(100, 124)))


class Essential:
    """torch's reader of archives, without what says nothing of tensors: torch minds what is in its own records."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def serialization_id(self) -> str:
        return ""

    def has_record(self, name: str) -> bool:
        return not name.startswith(".") and self._reader.has_record(name)


def torch_load(path: Path) -> Any:
    """What torch makes of it, or the error."""
    opened = torch.serialization._open_zipfile_reader
    with mock.patch.object(opened, "__enter__", lambda self: Essential(self.file_like), create=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            return error


def assert_same(entry: Entry, value: torch.Tensor) -> None:
    assert (entry.torch_dtype, entry.shape) == (value.dtype, tuple(value.shape))
    if value.numel() > MOST_ELEMENTS:
        return
    if isinstance(entry, EntryInMemory):
        found = entry.value
    else:
        stored = torch.frombuffer(bytearray(bytes_at(entry) or bytes(16)), dtype=torch.uint8)
        elements = stored[: stored.numel() // value.itemsize * value.itemsize].view(value.dtype)
        found = elements.as_strided(value.shape, entry.stride or torch.empty(value.shape, device="meta").stride())
    assert torch.equal(raw_bytes(found), raw_bytes(value))


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


JUDGES: dict[str, Callable[[bytes, Path], bool]] = {
    "header": header,
    "index": index,
    "archive": archive,
    "pickled": pickled,
}


def judged(name: str, raw: bytes) -> bool:
    """Whether a judge, who has a folder of its own, finds that an input is taken."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYINT8_FUZZ_FOLDER")) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about what is in the pickle
        return JUDGES[name](raw, Path(folder))
