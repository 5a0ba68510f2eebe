"""Folders that are removed though the system fails once, and are named where it fails again and again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from failing import failing

from pyint8.host.removal import discard_folder, remove_folder

CALLS = ["scandir", "lstat", "open", "fstat", "unlink", "rmdir", "close"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "it" / "inside").mkdir(parents=True)
    (tmp_path / "it" / "inside" / "file").write_text("text")
    (tmp_path / "it" / "file").write_text("text")
    return tmp_path / "it"


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_what_fails_once(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(name, nth))
        assert remove_folder(str(folder))
    assert not folder.exists()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["scandir", "fstat", "rmdir"])
def test_what_fails_always_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "pyint8"):
        patch.setattr(os, name, failing(name))
        assert not remove_folder(str(folder))
        discard_folder(str(folder))
    (message,) = caplog.messages
    assert message.startswith(f"{folder} is not needed any more")
    discard_folder(str(folder))
    assert not folder.exists()
    assert len(caplog.messages) == 1


def test_what_is_not_there_is_gone(tmp_path: Path) -> None:
    assert remove_folder(str(tmp_path / "none"))
