"""PyTorch's own checkpoints (`.bin`, `.pt`, `.pth`): where their tensors' bytes lie, without running the code in them.

Such a file is a pickle that names tensors, and their storages beside it: since torch 1.6 as records of a zip archive,
uncompressed, so that each has an offset. torch's own unpickler for data (`weights_only=True`) reads the pickle, with
tensors that are fake; what it says is checked against the archive's directory. Files of older torch are read by
torch.load as they are, into memory.
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyint8.errors import CheckpointError, TruncatedError

from ._reading import LFS_POINTER, LFS_PREFIX, os_errors
from .entry import DTYPES, Entry

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("pyint8")

EXTENSIONS = (".bin", ".pt", ".pth")
_AGAIN = "download it again, or convert it to safetensors where it was made"
_LOCAL_HEADER_BYTES = 30
_CODES = {attribute: code for code, (_, attribute) in DTYPES.items() if attribute is not None}


@dataclass(frozen=True)
class PickledFile:
    """What one file holds.

    Attributes:
        path: The file.
        entries: Its tensors by name, in order of offset. Tensors that share memory there overlap.
        metadata: Empty: the format has none.
    """

    path: str
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)


def read_pickled(path: str | os.PathLike[str]) -> PickledFile:
    """Read what a file that torch.save wrote says of its tensors; imports torch.

    Raises:
        CheckpointError: It is damaged, wants to run code, or holds something else than tensors by name.
        CheckpointNotFoundError: There is no such file.
        ReadError: The operating system refused to open or read it; `errno` says why.
    """
    path = os.fspath(path)
    with os_errors(path), open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(LFS_PREFIX):
        raise CheckpointError(LFS_POINTER, path=path)
    if start.endswith(b"\0\0\0{"):  # the length of a header, and its beginning
        raise CheckpointError("it is a safetensors file; let its name end in .safetensors", path=path)
    if not start.startswith(b"PK\x03\x04"):
        tensors = _tensors(path, _unpickle(path, mmap=False))
        return PickledFile(path, {name: _in_memory(path, name, tensor) for name, tensor in tensors.items()})
    records = _records(path)
    entries = [_entry(path, name, tensor, records) for name, tensor in _tensors(path, _unpickle_fake(path)).items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    return PickledFile(path, {entry.name: entry for entry in entries})


def _unpickle_fake(path: str) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _unpickle(path)


def _unpickle(path: str, **options: Any) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it cannot be read as data alone: it is damaged, or wants to run code. If you trust it, load it with "
            "torch.load(path, weights_only=False) and save its tensors with safetensors.torch.save_file "
            f"({_first_line(error)})",
            path=path,
        ) from error
    except Exception as error:  # torch's unpickler raises whatever damaged data leads it to
        raise CheckpointError(f"torch cannot read it ({_first_line(error)}); {_AGAIN}", path=path) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _tensors(path: str, state: Any) -> dict[str, torch.Tensor]:
    """Of a state dict, what is a tensor."""
    import torch

    if not isinstance(state, Mapping):
        raise CheckpointError(f"it holds a {type(state).__name__}, not tensors by name; {_AGAIN}", path=path)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    nested = [name for name, value in state.items() if isinstance(value, Mapping)]
    if not tensors and nested:
        raise CheckpointError(
            f"its tensors are inside {nested[0]!r}; save that alone: torch.save(torch.load(path)[{nested[0]!r}], path)",
            path=path,
        )
    if len(tensors) < len(state):
        left = [str(name) for name in state if name not in tensors]
        logger.warning("%s: %s are no tensors and are left out", path, ", ".join(left[:5]))
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"a tensor is named {name!r}; names are strings", path=path)
        if tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "quantized by torch" if tensor.is_quantized else str(tensor.layout)
            raise CheckpointError(f"the tensor is {kind}; save it as an ordinary one", path=path, tensor=name)
        if tensor.is_neg() or tensor.is_conj():
            raise CheckpointError(
                "the tensor is saved as the negative or conjugate of what is in the file; save it resolved: "
                "tensor.resolve_neg().resolve_conj()",
                path=path,
                tensor=name,
            )
    return tensors


def _code(path: str, name: str, tensor: torch.Tensor) -> str:
    attribute = str(tensor.dtype).removeprefix("torch.")
    if attribute not in _CODES:
        raise CheckpointError(f"a tensor of dtype {attribute} cannot be loaded", path=path, tensor=name)
    return _CODES[attribute]


def _in_memory(path: str, name: str, tensor: torch.Tensor) -> Entry:
    value = tensor.detach().contiguous()
    return Entry(name, _code(path, name, tensor), tuple(tensor.shape), path, 0, value.nbytes, value=value)


def _entry(path: str, name: str, tensor: torch.Tensor, records: dict[int, int]) -> Entry:
    """Where the tensor's elements lie: all of its storage's bytes from its first to its last."""
    size = tensor.element_size()
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    span = 0
    if tensor.numel():
        span = (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))) * size
    elif start is None:
        start = 0  # an empty storage needs no record
    first = tensor.storage_offset() * size
    if start is None or first < 0 or first + span > records.get(start, 0):
        raise CheckpointError(f"the tensor lies outside of its storage; {_AGAIN}", path=path, tensor=name)
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Entry(name, _code(path, name, tensor), tuple(tensor.shape), path, start + first, span, stride=stride)


def _records(path: str) -> dict[int, int]:
    """The sizes of the archive's records, by the offset of their first byte in the file."""
    records = {0: 0}
    with os_errors(path), open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        try:
            directory = zipfile.ZipFile(file).infolist()
        except zipfile.BadZipFile as error:
            raise TruncatedError(f"the archive is cut short or damaged; {_AGAIN}", path=path, offset=end) from error
        for record in directory:
            file.seek(record.header_offset)
            header = file.read(_LOCAL_HEADER_BYTES)
            if len(header) < _LOCAL_HEADER_BYTES or record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"the archive is compressed or damaged; {_AGAIN}", path=path)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            start = record.header_offset + _LOCAL_HEADER_BYTES + names
            if start + record.file_size > end:
                raise TruncatedError(f"the file ends within {record.filename}; {_AGAIN}", path=path, offset=end)
            if record.filename.endswith("/byteorder") and file.read(names + 6)[names:] not in (b"little", b""):
                raise CheckpointError("its numbers are big-endian; save it again on this kind of machine", path=path)
            records[start] = record.file_size
    return records
