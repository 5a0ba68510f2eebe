"""safetensors files byte by byte, as no writer writes them."""

from __future__ import annotations

import json
from typing import Any


def framed(header: Any, data: bytes = b"") -> bytes:
    """The bytes of a file; a header that is not bytes is made JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
