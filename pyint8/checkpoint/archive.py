"""The zip archives that torch.save writes: a pickle, and a record for each storage that the pickle names.

torch's own reader finds the records, so that of several of one name, or in whatever folder and order, those are taken
that torch.load takes; the archive's directory says how long they are. torch's own unpickler for data reads the pickle.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pyint8.errors import CheckpointError, TruncatedError

from ._reading import ARCHIVE_PREFIX, abbreviated

if TYPE_CHECKING:
    import torch

AGAIN = "download it again, or convert it to safetensors where it was made"

_LOCAL_HEADER_BYTES = 30
# Flags of records that are encrypted, or patches.
_NOT_PLAIN = 0x61
# An attribute of records.
_FOLDER = 0x10


@dataclass(frozen=True)
class _Record:
    nbytes: int
    is_plain: bool  # in the file as in memory


class TorchArchive:
    """One archive, whose pickle is read with storages on meta.

    Args:
        path: The file, for errors.
        file: Open; used until `unpickle` is over.

    Attributes:
        is_plain: Whether the storages lie in the file as in memory, as far as `unpickle` has seen: not compressed, and
            of this machine's byte order. Else only torch.load can read them.

    Raises:
        TruncatedError: The file ends before its directory says so.
        CheckpointError: The directory is damaged.
        RuntimeError: torch finds no archive in it.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        import torch

        self._path = path
        self._records = _records(path, file)
        file.seek(0)
        self._reader: Any = torch._C.PyTorchFileReader(file)
        self._stand_ins: dict[str, torch.storage.TypedStorage] = {}
        self._places: dict[int, tuple[int, int]] = {}  # by the address of the stand-in for a storage
        self.is_plain = self._byte_order() == sys.byteorder.encode() and not self._is_torchscript()

    def unpickle(self) -> Any:
        """What the pickle holds, its tensors on meta.

        Raises:
            pickle.UnpicklingError: It would run code, or is damaged.
            CheckpointError: The record of a storage is missing, or not as long as the storage.
            Exception: Anything else that torch's unpickler raises for damaged data.
        """
        from torch._weights_only_unpickler import Unpickler

        unpickler: Any = Unpickler(io.BytesIO(self._reader.get_record("data.pkl")), encoding="utf-8")
        unpickler.persistent_load = self._stand_in
        return unpickler.load()

    def location_of(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Where a tensor's storage begins in the file, and its bytes; None for a tensor that has none there."""
        return self._places.get(tensor.untyped_storage()._cdata)

    def _stand_in(self, saved_id: Any) -> torch.storage.TypedStorage:
        """The storage that torch.load would read for ("storage", type, key, device, elements), without values."""
        import torch

        what, kind, key, _, numel = saved_id
        if not isinstance(saved_id, tuple) or what not in ("storage", b"storage"):
            raise pickle.UnpicklingError(f"it refers to {abbreviated(what)}, where storages alone are known")
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in self._stand_ins:
            nbytes = numel * dtype.itemsize
            storage = torch.UntypedStorage(nbytes, device="meta")
            self._places[storage._cdata] = self._find(f"data/{key}", nbytes), nbytes
            self._stand_ins[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        return self._stand_ins[key]

    def _find(self, name: str, nbytes: int) -> int:
        """Where the record of a storage begins."""
        start: int = self._reader.get_record_offset(name) if self._reader.has_record(name) else -1
        record = self._records.get(start)
        if record is None:
            raise CheckpointError(f"the archive has no record {name}, which its pickle names; {AGAIN}", path=self._path)
        if record.nbytes != nbytes:
            raise CheckpointError(
                f"the record {name} has {record.nbytes} bytes, and its storage {nbytes}; {AGAIN}",
                path=self._path,
                offset=start,
            )
        self.is_plain = self.is_plain and record.is_plain
        return start

    def _byte_order(self) -> bytes:
        has_one = self._reader.has_record("byteorder")
        return self._reader.get_record("byteorder") if has_one else b"little"  # of older torch

    def _is_torchscript(self) -> bool:
        return "constants.pkl" in self._reader.get_all_records()


def require_whole(path: str, file: BinaryIO) -> None:
    """Refuses an archive that torch.load would read wrongly: of a record that it cannot inflate, or that says it is a
    folder, it gives memory that nobody has written to.

    Raises:
        CheckpointError: It is one.
    """
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        damaged = _damage(archive) if any(record.compress_type for record in records) else None
        damaged = damaged or next((record.filename for record in records if record.external_attr & _FOLDER), None)
    if damaged is not None:
        raise CheckpointError(f"the archive is damaged ({damaged}); {AGAIN}", path=path)


def _damage(archive: zipfile.ZipFile) -> str | None:
    """What is wrong with the first record that is not as the directory says, of those in a form that torch can read."""
    for record in archive.infolist():
        if record.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            try:
                _read_through(archive, record)
            # NotImplementedError is a RuntimeError; ValueErrors are of names in no known encoding.
            except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
                return f"{record.filename}: {error}"
    return None


def _read_through(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    with archive.open(record) as content:
        while content.read(1 << 20):
            pass


def _most_inflated(record: zipfile.ZipInfo) -> int:
    """How many bytes may come of one in the file; the deflate format's limit."""
    return 1 if record.compress_type == zipfile.ZIP_STORED else 1032


def _records(path: str, file: BinaryIO) -> dict[int, _Record]:
    """The archive's records, by the offset of their first byte in the file."""
    end = os.fstat(file.fileno()).st_size
    try:
        directory = zipfile.ZipFile(file).infolist()
    except zipfile.BadZipFile as error:
        if isinstance(error.__context__, OSError):  # which zipfile takes for damage
            raise error.__context__ from None
        raise TruncatedError(f"the archive is cut short or damaged; {AGAIN}", path=path, offset=end) from error
    except (NotImplementedError, ValueError) as error:  # of another version, or names in no known encoding
        raise CheckpointError(f"the archive's directory cannot be read ({error}); {AGAIN}", path=path) from error
    records = {}
    for record in directory:
        file.seek(record.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = record.header_offset + _LOCAL_HEADER_BYTES + names
        if start + record.compress_size > end:
            raise TruncatedError(f"the file ends within {record.filename}; {AGAIN}", path=path, offset=end)
        if record.file_size > record.compress_size * _most_inflated(record):  # for which torch would take memory
            raise CheckpointError(
                f"the archive is damaged ({record.filename} cannot have {record.file_size} bytes, of which there are "
                f"{record.compress_size} in the file); {AGAIN}",
                path=path,
                offset=start,
            )
        is_stored = record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & _NOT_PLAIN
        records[start] = _Record(record.file_size, is_stored and header.startswith(ARCHIVE_PREFIX))
    return records
