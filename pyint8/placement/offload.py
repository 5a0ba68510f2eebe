"""Parameters written to an offload folder, as accelerate writes and reads them, but safe on a disk that is full.

accelerate writes through a mapping of a file without blocks: where the disk has none left, the kernel kills the process
(SIGBUS). Here the bytes are written, so that a full disk is an error.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from pyint8.errors import OptionError
from pyint8.host.files import exists, is_folder
from pyint8.host.writing import write_errors


def offload(tensor: torch.Tensor, name: str, folder: str, index: dict[str, Any]) -> None:
    """Write a parameter to `folder` and describe it in `index` (source: accelerate.utils.offload.offload_weight).

    Raises:
        WriteError: The operating system refused, as on a full disk; then no part of the file is left.
    """
    tensor = tensor.detach().contiguous().cpu()
    path = _path_of(name, folder)
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    with write_errors(path, name):
        os.makedirs(folder, exist_ok=True)
        _write(path, raw.data if raw.size else memoryview(b"\0"))  # no empty file can be mapped
    index[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _write(path: str, raw: memoryview) -> None:
    """All of it, or nothing: a file under another name until it is whole."""
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            file.write(raw)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def check_folder(folder: Any) -> str | None:
    """The folder to offload to, as a string.

    Raises:
        OptionError: It is none, or it is there and no folder.
    """
    if folder is None:
        return None
    try:
        path = os.fsdecode(folder)
    except TypeError:
        raise OptionError(f"offload_folder is {reprlib.repr(folder)}; it must be the path of a folder") from None
    if "\0" in path or (exists(path, follow=False) and not is_folder(path)):
        raise OptionError(f"offload_folder is {path!r}, which is no folder; give the path of one, or of a new one")
    return path


def remove(names: Iterable[str], folder: str) -> None:
    """Remove the files of parameters again; those that are not there are no error."""
    for name in names:
        with suppress(OSError):
            os.unlink(_path_of(name, folder))


def _path_of(name: str, folder: str) -> str:
    return os.path.join(folder, f"{name}.dat")
