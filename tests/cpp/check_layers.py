"""Fails if a file of the core includes one that it must not know: `check_layers.py csrc/core`.

Rooms know each other in one direction only; this table is that direction.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Room (a folder, or a pair of files at the top) -> what it may include beside itself.
MAY_INCLUDE: dict[str, set[str]] = {
    "error": set(),
    "storage": {"error"},
    "numeric": {"error"},
    "options": {"error", "storage"},
    "device": {"error", "numeric"},
    "transfer": {"error", "storage", "numeric", "options", "device"},
    "quantize": {"error", "numeric", "device", "transfer"},
}
# Files that must not know others of their room, but for these.
KNOWS: dict[str, set[str]] = {
    "plan": set(),
    "ring": set(),
    "lane_queue": set(),
    "checksum": set(),
    "timeline": set(),
    "workers": {"lane_queue"},
    "bands": set(),
    "scratch": set(),
}

_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def room_of(path: Path) -> str:
    """The room of a path relative to the core."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def is_allowed(file: Path, included: Path) -> bool:
    """Whether `file` may include `included`, both relative to the core."""
    room, other = room_of(file), room_of(included)
    if room != other:
        return other in MAY_INCLUDE[room]
    return file.stem not in KNOWS or included.stem in {file.stem, *KNOWS[file.stem]}


def violations(core: Path) -> list[str]:
    """Every include that breaks the table, as "file includes file"."""
    files = [path for path in sorted(core.rglob("*")) if path.suffix in {".hpp", ".cpp", ".cu"}]
    return [
        f"{file.relative_to(core)} includes {included}"
        for file in files
        for included in _INCLUDE.findall(file.read_text())
        if not is_allowed(file.relative_to(core), Path(included))
    ]


if __name__ == "__main__":
    found = violations(Path(sys.argv[1]))
    print("\n".join(found) or "the core's includes follow its layers")
    sys.exit(bool(found))
