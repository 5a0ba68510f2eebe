"""Fixtures of the contract's tests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pyint8

if TYPE_CHECKING:
    from range_server import RangeServer
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


# --- checkpoints under URLs -------------------------------------------------------------------------------------------


@pytest.fixture
def far_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every byte that is not a server's own is 0xFF, NaN in all dtypes of weights; and no folder stays behind."""
    pytest.importorskip("obstore")

    def extend(path: str, size: int) -> None:
        with open(path, "ab") as file:
            file.write(b"\xff" * (size - file.tell()))

    monkeypatch.setattr("pyint8.remote.folder._extend", extend)
    monkeypatch.setattr("pyint8.remote.folder._FIRST_BYTES", 8)  # of tensors no byte, even of small ones
    monkeypatch.setattr("pyint8.remote.store._FIRST_PAUSE_SECONDS", 0.01)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


@pytest.fixture
def server(checkpoints: CheckpointStore) -> Iterator[RangeServer]:
    """Of a checkpoint in several files."""
    from range_server import serving
    from zoo import ZOO

    with serving(checkpoints.folder(ZOO["llama_sharded"], "bf16")) as served:
        yield served


@pytest.fixture
def changeable(copy_of: Callable[..., Path]) -> Iterator[RangeServer]:
    """Of files that the test may change."""
    from range_server import serving

    with serving(copy_of("llama", "bf16")) as served:
        yield served


@pytest.fixture
def threads_of_obstore(far_away: None, server: RangeServer) -> None:
    """They stay, as torch's do: let them be there before a test counts what is left."""
    from pyint8.remote.folder import opened

    with opened(server.url):
        server.requests.clear()
