"""Files of checksums, by a CRC-32C of their own."""

from __future__ import annotations

import json
from pathlib import Path

from pyint8.checkpoint import Checkpoint, Entry, open_checkpoint
from pyint8.checkpoint.checksums import CHECKSUMS


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    """Byte by byte, as RFC 3720 has it."""
    state = 0xFFFFFFFF
    for byte in data:
        state = TABLE[(state ^ byte) & 0xFF] ^ state >> 8
    return state ^ 0xFFFFFFFF


def expected(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """By file and tensor, what a file of checksums should say."""
    files: dict[str, dict[str, str]] = {}
    for name, entry in checkpoint.items():
        raw = Path(entry.path).read_bytes()[entry.offset : entry.offset + entry.nbytes]
        files.setdefault(Path(entry.path).name, {})[name] = f"{crc32c(raw):08x}"
    return files


def noted(folder: Path) -> dict[str, dict[str, str]]:
    """What the file of checksums in a folder says."""
    content = json.loads((folder / CHECKSUMS).read_text())
    assert content["algorithm"] == "crc32c"
    files: dict[str, dict[str, str]] = content["files"]
    return files


def add_checksums(folder: Path) -> Checkpoint:
    """Writes the checksums of a checkpoint beside it."""
    content = {"algorithm": "crc32c", "files": expected(open_checkpoint(folder))}
    (folder / CHECKSUMS).write_text(json.dumps(content))
    return open_checkpoint(folder)


def damage(entry: Entry, at: int) -> None:
    """Flips the last bit of a byte of a tensor, which makes no number infinite."""
    with open(entry.path, "r+b") as file:
        file.seek(entry.offset + at)
        byte = file.read(1)[0]
        file.seek(entry.offset + at)
        file.write(bytes([byte ^ 1]))
