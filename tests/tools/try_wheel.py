"""Whether the installed package works: `python -I try_wheel.py`, with the standard library and `packaging` alone.

Imports it, looks at its facts, moves bytes through the compiled engine and has it fail; without transformers, loading
must say so. The tests proper need torch: tests/tools/test_wheel.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pyint8
from pyint8 import _core, errors

CONTENT = os.urandom(3 * 1024 * 1024 + 17)


def engine() -> _core.Engine:
    return _core.Engine(threads=2, slots_per_thread=2, slot_bytes=1 << 20, direct_io=False)


def reads_bytes(folder: Path) -> None:
    """Ranges of a file land where they were asked for, whole, odd ends included."""
    path = folder / "bytes"
    path.write_bytes(CONTENT)
    landed = (ctypes.c_char * len(CONTENT))()
    streaming = engine()
    lane = streaming.add_host_device(1)
    file, cut = streaming.add_file(str(path)), 1024 * 1024 + 3
    to = ctypes.addressof(landed)
    ticket = streaming.submit(lane, [(file, 0, cut, to), (file, cut, len(CONTENT) - cut, to + cut)], 0, first=False)
    streaming.wait(ticket, 0)
    streaming.wait(ticket + 1, 0)
    streaming.close()
    assert landed.raw == CONTENT


def raised_by(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def fails_typed(folder: Path) -> None:
    """The engine's errors arrive as the package's classes, with the path."""
    missing = folder / "missing"
    error = raised_by(lambda: engine().add_file(str(missing)))
    assert isinstance(error, errors.ReadError), repr(error)
    assert error.path == str(missing), error.path


def says_what_is_missing(folder: Path) -> None:
    """Without transformers a load ends with an ImportError that says how to get it."""
    if importlib.util.find_spec("transformers") is not None:
        return
    error = raised_by(lambda: pyint8.load(folder))
    assert isinstance(error, errors.MissingDependencyError), repr(error)
    assert "pip install" in str(error), error


def knows_itself(folder: Path) -> None:
    """The version is one, and a released wheel has its kernels."""
    assert metadata.version("pyint8") == pyint8.__version__
    assert _core.has_kernels(), "built without GPU kernels"
    assert _core.pinned_bytes_in_use() == 0


def has_its_command(folder: Path) -> None:
    """`pyint8` is installed as a program, and needs nothing else for its help."""
    (script,) = (each for each in metadata.entry_points(group="console_scripts") if each.name == "pyint8")
    assert callable(script.load())
    done = subprocess.run(
        [sys.executable, "-I", "-m", "pyint8", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"pyint8 {pyint8.__version__}\n", done.stdout


def takes_the_lock(folder: Path) -> None:
    """It does not claim to do without the interpreter's lock, so a free-threaded Python has switched it on by now."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert sys._is_gil_enabled()  # type: ignore[attr-defined, unused-ignore]


CHECKS: tuple[Callable[[Path], None], ...] = (
    knows_itself,
    has_its_command,
    takes_the_lock,
    reads_bytes,
    fails_typed,
    says_what_is_missing,
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for check in CHECKS:
            check(Path(folder))
    python = f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"
    print(f"pyint8 {pyint8.__version__} works on {python}, with kernels, from {Path(pyint8.__file__).parent}")


if __name__ == "__main__":
    main()
