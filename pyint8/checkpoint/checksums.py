"""Checksums of tensors, in a file beside the shards: written by a save, compared while tensors are read.

`model.safetensors.crc32c.json` has, by file and tensor, the CRC-32C of the tensor's bytes in hexadecimal digits:
`{"algorithm": "crc32c", "files": {"model.safetensors": {"a.weight": "e3069283"}}}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pyint8.errors import CheckpointError
from pyint8.host.files import open_file

from ._reading import os_errors
from .pickled import PickledFile
from .safetensors import SafetensorsFile

if TYPE_CHECKING:
    from .entry import Entry

CHECKSUMS = "model.safetensors.crc32c.json"
_ALGORITHM = "crc32c"


def checksums_text(file_of: Mapping[str, str], checksums: Mapping[str, int]) -> bytes:
    """The content of the file.

    Args:
        file_of: By tensor, the name of its file.
        checksums: By tensor, its CRC-32C.
    """
    files: dict[str, dict[str, str]] = {}
    for name, file in file_of.items():
        files.setdefault(file, {})[name] = f"{checksums[name]:08x}"
    return json.dumps({"algorithm": _ALGORITHM, "files": files}, indent=1).encode() + b"\n"


def with_checksums(files: Iterable[SafetensorsFile | PickledFile]) -> list[SafetensorsFile | PickledFile]:
    """Files of a checkpoint whose entries know their checksums, where there are any.

    Raises:
        CheckpointError: A file of checksums is none.
        ReadError: The operating system refused.
    """
    of_folder: dict[str, Mapping[str, Mapping[str, int]]] = {}
    found: list[SafetensorsFile | PickledFile] = []
    for file in files:
        if isinstance(file, SafetensorsFile):
            folder, name = os.path.split(file.path)
            if folder not in of_folder:
                of_folder[folder] = _read(os.path.join(folder, CHECKSUMS))
            file = _noted(file, of_folder[folder].get(name, {}))
        found.append(file)
    return found


def _noted(file: SafetensorsFile, checksums: Mapping[str, int]) -> SafetensorsFile:
    if not checksums:
        return file
    entries: dict[str, Entry] = {
        name: replace(entry, crc32c=checksums.get(name)) for name, entry in file.entries.items()
    }
    return replace(file, entries=entries)


def _read(path: str) -> Mapping[str, Mapping[str, int]]:
    """By file and tensor; nothing where there is no such file."""
    with os_errors(path):
        try:
            with open_file(path) as file:
                raw = file.read()
        except FileNotFoundError:
            return {}
    try:
        content = json.loads(raw)
        if content["algorithm"] != _ALGORITHM:
            raise ValueError(f"its algorithm is {content['algorithm']!r:.50}, not {_ALGORITHM!r}")
        return {file: _parsed(checksums) for file, checksums in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"these are no checksums ({type(error).__name__}: {error}); remove the file to load without them"
        raise CheckpointError(problem, path=path) from error


def _parsed(checksums: Mapping[str, str]) -> dict[str, int]:
    found = {name: int(text, 16) for name, text in checksums.items()}
    wrong = [name for name, value in found.items() if not 0 <= value < 1 << 32]
    if wrong:
        raise ValueError(f"that of {min(wrong)!r:.200} has more than 32 bits")
    return found
