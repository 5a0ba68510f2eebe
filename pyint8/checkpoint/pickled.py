"""PyTorch's own checkpoints (`.bin`, `.pt`, `.pth`): where their tensors' bytes lie, without running the code in them.

Such a file is a pickle that names tensors, and their storages beside it: since torch 1.6 as records of a zip archive,
so that each has an offset. What does not lie in the file as in memory (compressed records, the other byte order, files
of older torch) is read by torch.load, into memory.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from pyint8.errors import CheckpointError, Pyint8Error
from pyint8.host.files import open_file

from ._reading import ARCHIVE_PREFIX, LEGACY_PREFIX, LFS_POINTER, LFS_PREFIX, os_errors
from .archive import AGAIN, TorchArchive, require_whole
from .entry import CODES, Entry, EntryInMemory
from .stamp import FileStamp, reading

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXTENSIONS = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class PickledFile:
    """What one file holds.

    Attributes:
        path: The file.
        entries: Its tensors by name, in order of offset. Tensors that share memory there overlap.
        stamp: Its state when it was read.
        metadata: Empty: the format has none.
    """

    path: str
    entries: dict[str, Entry]
    stamp: FileStamp
    metadata: dict[str, str] = field(default_factory=dict)


def is_pickled(path: str) -> bool:
    """Whether a file begins as torch.save's files do, whatever its name.

    Raises:
        CheckpointNotFoundError: There is no such file.
        ReadError: The operating system refused to open or read it; `errno` says why.
    """
    with os_errors(path), open_file(path) as file:
        return file.read(len(LEGACY_PREFIX)).startswith((ARCHIVE_PREFIX, LEGACY_PREFIX))


def read_pickled(path: str | os.PathLike[str]) -> PickledFile:
    """Read what a file that torch.save wrote says of its tensors; imports torch.

    Raises:
        CheckpointError: It is damaged, would run code, or holds something other than tensors by name.
        CheckpointNotFoundError: There is no such file.
        FileChangedError: The file was written to meanwhile.
        ReadError: The operating system refused to open or read it; `errno` says why.
    """
    path = os.fspath(path)
    with os_errors(path), open_file(path) as file, reading(path, file) as stamp:
        start = file.read(9)
        _refuse_other_formats(path, start)
        entries = _entries_in_archive(path, file) if start.startswith(ARCHIVE_PREFIX) else None
        if entries is None:
            tensors = _tensors(path, _load(path, file))
            entries = [_in_memory(path, name, tensor) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    return PickledFile(path, {entry.name: replace(entry, stamp=stamp) for entry in entries}, stamp)


def _refuse_other_formats(path: str, start: bytes) -> None:
    if start.startswith(LFS_PREFIX):
        raise CheckpointError(LFS_POINTER, path=path)
    if start.endswith(b"\0\0\0{"):  # the length of a header, and its beginning
        raise CheckpointError("it is a safetensors file; let its name end in .safetensors", path=path)


def _entries_in_archive(path: str, file: BinaryIO) -> list[Entry] | None:
    """Where an archive's tensors lie; None where only torch.load can read them."""
    with _torch_errors(path):
        archive = TorchArchive(path, file)
        state = archive.unpickle()
    if not archive.is_plain:
        require_whole(path, file)
        return None
    return [_entry(path, name, tensor, archive) for name, tensor in _tensors(path, state).items()]


def _load(path: str, file: BinaryIO) -> Any:
    """The result of torch.load, in memory."""
    import torch

    file.seek(0)
    with _torch_errors(path):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


@contextmanager
def _torch_errors(path: str) -> Iterator[None]:
    """Turns whatever torch raises at what is damaged or hostile into `CheckpointError`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it cannot be read as data alone: it is damaged, or wants to run code. If you trust it, load it with "
            "torch.load(path, map_location='cpu', weights_only=False), and torch.save the dict of tensors in it (of a "
            f"module, its state_dict()) to another file ({_first_line(error)})",
            path=path,
        ) from error
    except (Pyint8Error, OSError, MemoryError):
        raise
    except Exception as error:
        if "not enough memory" in str(error):  # torch's words, of a RuntimeError
            raise
        raise CheckpointError(f"torch cannot read it ({_first_line(error)}); {AGAIN}", path=path) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _tensors(path: str, state: Any) -> dict[str, torch.Tensor]:
    """Of a state dict, what is a tensor."""
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"it holds a {type(state).__name__}, not tensors by name; torch.save a dict of them", path=path
        )
    tensors = _tensors_in(state)
    _refuse_nested(path, state, len(tensors))
    if len(tensors) < len(state):
        left = [str(name) for name in state if name not in tensors]
        logger.warning("%s: %s are no tensors and are left out", path, ", ".join(left[:5]))
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"a tensor is named {name!r}; names are strings: torch.save it with one", path=path)
        _require_ordinary(path, name, tensor)
    return tensors


def _tensors_in(state: Mapping[Any, Any]) -> dict[Any, torch.Tensor]:
    import torch

    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _refuse_nested(path: str, state: Mapping[Any, Any], tensors: int) -> None:
    """Refuses files with more tensors one level down, as training checkpoints have, than the `tensors` at the top."""
    nested = {name: len(_tensors_in(value)) for name, value in state.items() if isinstance(value, Mapping)}
    most = max(nested, key=nested.__getitem__, default=None)
    if most is not None and nested[most] > tensors:
        raise CheckpointError(
            f"its tensors are inside {most!r}; save those alone to another file: "
            f"torch.save(torch.load(path, map_location='cpu')[{most!r}], 'weights.pt')",
            path=path,
        )


def _require_ordinary(path: str, name: str, tensor: torch.Tensor) -> None:
    """Refuses tensors that are not plain numbers in memory."""
    import torch

    kind = None
    if tensor.is_quantized:
        kind = "quantized by torch"
    elif tensor.layout is not torch.strided:
        kind = str(tensor.layout)
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = f"a {type(tensor).__name__}"
    if kind is not None:
        raise CheckpointError(f"the tensor is {kind}; save it as an ordinary one", path=path, tensor=name)
    if tensor.is_neg() or tensor.is_conj():
        raise CheckpointError(
            "the tensor is saved as the negative or conjugate of what is in the file; save it resolved: "
            "tensor.resolve_neg().resolve_conj()",
            path=path,
            tensor=name,
        )


def _dtype_name(path: str, name: str, tensor: torch.Tensor) -> str:
    attribute = str(tensor.dtype).removeprefix("torch.")
    if attribute not in CODES:
        problem = f"a tensor of dtype {attribute} cannot be loaded; save it with another"
        raise CheckpointError(problem, path=path, tensor=name)
    return CODES[attribute]


def _in_memory(path: str, name: str, tensor: torch.Tensor) -> Entry:
    if tensor.is_meta:
        raise CheckpointError("the tensor was saved without values, from meta", path=path, tensor=name)
    value = tensor.detach().contiguous()
    dtype = _dtype_name(path, name, tensor)
    return EntryInMemory(name, dtype, tuple(tensor.shape), path, 0, value.nbytes, value=value)


def _entry(path: str, name: str, tensor: torch.Tensor, archive: TorchArchive) -> Entry:
    """Where the tensor's elements lie: all of its storage's bytes from its first to its last."""
    place = archive.location_of(tensor)
    if place is None:  # the pickle itself has its values
        return _in_memory(path, name, tensor)
    start, nbytes = place
    size, first, span = tensor.element_size(), 0, 0
    if tensor.numel():  # an empty one may begin anywhere
        first = int(tensor.storage_offset()) * size
        span = (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))) * size
    if first < 0 or first + span > nbytes:
        raise CheckpointError(f"the tensor lies outside of its storage; {AGAIN}", path=path, tensor=name)
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Entry(name, _dtype_name(path, name, tensor), tuple(tensor.shape), path, start + first, span, stride=stride)
