"""Fixtures of the contract's tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pyint8

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


@pytest.fixture(scope="session")
def source(checkpoints: CheckpointStore) -> Path:
    """A checkpoint in one file."""
    from zoo import ZOO

    return checkpoints.folder(ZOO["llama"], "bf16")


@pytest.fixture(scope="session")
def int8(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its int8 form, in one file."""
    folder = tmp_path_factory.mktemp("int8") / "int8"
    pyint8.convert(source, folder, device="cpu")
    return folder


@pytest.fixture(scope="session")
def sharded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its int8 form, in many."""
    folder = tmp_path_factory.mktemp("sharded") / "int8"
    pyint8.convert(source, folder, device="cpu", max_shard_size="20KB")
    return folder
