"""What lies beside a checkpoint's weights: tokenizer, processor, templates, licence, code."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

from pyint8.host.files import exists

from .checksums import CHECKSUMS

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".npz"),
    *(".tflite", ".ot", ".index"),
)
_NOT_CARRIED = frozenset({"config.json", "generation_config.json", "README.md", CHECKSUMS})
_OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.(index|crc32c)\.json|(generation_)?config\.json"
)


def is_of_a_save(name: str) -> bool:
    """Whether a file of this name is what a save writes, this time or another: weights, index, configuration."""
    return _OURS.fullmatch(name) is not None


def side_files(folder: str) -> Iterator[str]:
    """The paths, relative to `folder`, of all its files but weights, configuration, card, and what is hidden.

    Of folders inside of it, those count that hold neither weights nor folders (such as chat templates).
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from (os.path.join(entry.name, name) for name in _plain_files(entry.path))
        elif not is_weights(entry.name) and entry.name not in _NOT_CARRIED:
            yield entry.name


def carry_side_files(source: str, folder: str) -> list[str]:
    """Copies what lies beside the weights in `source` to `folder`, unless it is there already.

    Returns:
        The names of all that lies there.

    Raises:
        OSError: A file cannot be read or written.
    """
    names = list(side_files(source))
    for name in names:
        new = os.path.join(folder, name)
        if not exists(new):
            os.makedirs(os.path.dirname(new), exist_ok=True)
            shutil.copyfile(os.path.join(source, name), new)  # of links, such as the hub's cache has, what they lead to
    return names


def _plain_files(folder: str) -> list[str]:
    inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if any(entry.is_dir() or is_weights(entry.name) for entry in inside):
        return []
    return [entry.name for entry in inside if not entry.name.startswith(".")]


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, an index of them, or an adapter."""
    return name.endswith((*_WEIGHTS, ".index.json")) or name.startswith("adapter_")
