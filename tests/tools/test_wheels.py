"""Which Pythons `make wheels` builds for, and the notices of what is linked in."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import wheels

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_release_is_what_runs(tmp_path: Path) -> None:
    assert wheels.is_release(sys.executable, THIS)
    assert not wheels.is_release(sys.executable, "3.9")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 127\n")  # pyenv's, of a release that is not switched on
    broken.chmod(0o755)
    assert not wheels.is_release(str(broken), THIS)


def test_pyenv_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    for version in ("3.13.0", "3.14.1", "3.14.1t"):
        (tmp_path / "versions" / version).mkdir(parents=True)
    assert list(wheels.candidates("3.14")) == [f"{tmp_path}/versions/3.14.1/bin/python"]
    assert list(wheels.candidates("3.14t")) == [f"{tmp_path}/versions/3.14.1t/bin/python"]


def test_the_notice_is_pybind11s() -> None:
    (notice,) = (f for f in metadata.files("pybind11") or [] if f.name == "LICENSE")
    assert (wheels.ROOT / "csrc/licenses/pybind11.txt").read_text() == notice.read_text()


def test_the_notice_is_zigs() -> None:
    import ziglang

    notice = Path(ziglang.__file__).with_name("LICENSE")
    assert (wheels.ROOT / "csrc/licenses/zig.txt").read_text() == notice.read_text()
