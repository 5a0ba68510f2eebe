"""Files for the tests of the extension and of the stream."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(300_001)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    return str(file)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Tensors of many dtypes and sizes."""
    from streams import MIXED, write

    return write(tmp_path_factory.mktemp("mixed") / "model.safetensors", MIXED)
