"""Fixtures of the contract's tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from zoo import CheckpointStore


@pytest.fixture(scope="session")
def old(checkpoints: CheckpointStore) -> Path:
    """The checkpoint of a model before a reload."""
    from zoo import ZOO

    return checkpoints.folder(ZOO["llama_sharded"], "bf16")


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same architecture, with other values."""
    from reloads import LLAMA, saved
    from zoo import randomise

    return saved(randomise(LLAMA.build(), "another llama"), tmp_path_factory.mktemp("other"))
