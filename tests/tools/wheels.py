"""Source distribution and wheels, built, checked and tried: `make wheels [PYTHONS="python3.12 /opt/python3.14"]`.

One source distribution, and from it, as an installer would, a manylinux wheel for each Python: those named, or one of
each release that is at hand, two at once. Each wheel is checked (check_wheel.py), installed into an environment of its
own, with nothing else on PATH, compared with its stub (check_stub.py) and tried (try_wheel.py).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOOLS = Path(__file__).parent
ROOT = TOOLS.parents[1]
RELEASES = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")
PLATFORM = f"manylinux_2_28_{platform.machine()}"


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints, at its end; its whole output where it fails.

    Raises:
        SystemExit: It failed.
    """
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout.strip()


def candidates(release: str) -> Iterator[str]:
    """Where a release of CPython may be: on PATH, or among pyenv's."""
    yield from filter(None, [shutil.which(f"python{release}")])
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pattern = release.removesuffix("t") + (".*t" if release.endswith("t") else ".*[0-9]")
    yield from (str(path / "bin/python") for path in sorted(versions.glob(pattern), reverse=True))


# The release of the Python that runs it, if that can make environments and has the headers of C.
WHICH = """
import ensurepip, pathlib, sysconfig
if pathlib.Path(sysconfig.get_path("include"), "Python.h").exists():
    print(sysconfig.get_python_version() + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
"""


def is_release(python: str, release: str) -> bool:
    """Whether it runs (pyenv has names for those that it would not run), is this release, and can be built for."""
    done = subprocess.run([python, "-c", WHICH], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() == release


def at_hand() -> list[str]:
    """The first Python of each release that there is."""
    found = (next((p for p in candidates(release) if is_release(p, release)), None) for release in RELEASES)
    return [python for python in found if python is not None]


def build_sdist(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    return next(folder.glob("pyint8-*.tar.gz"))


def debian_headers(folder: Path) -> str:
    """An option for Debian's Pythons: a part of their headers lies among the C library's, which Zig must not see."""
    machine = f"{platform.machine()}-linux-gnu"
    for headers in Path("/usr/include", machine).glob("python3.*"):
        link = folder / machine / headers.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(headers)
    return f"-isystem {folder}"


def unpacked(sdist: Path, folder: Path) -> Path:
    """Once for all wheels: a cache of the compiler's, where there is one, knows files by their paths."""
    shutil.unpack_archive(sdist, folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def build_wheel(python: Path, source: Path, flags: str, folder: Path) -> Path:
    """For manylinux, by Zig."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    zig = {"CXX": str(TOOLS / "zig-c++"), "CXXFLAGS": flags}
    raw = folder / "raw"
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", raw, source, PATH=path, **zig)
    wheel = next(raw.glob("pyint8-*.whl"))
    repaired = folder / "repaired"
    repair = (sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat")
    run(*repair, "-w", repaired, wheel, PATH=path)
    return next(repaired.glob("pyint8-*.whl"))


def environment(python: str, folder: Path) -> Path:
    """The interpreter of a new environment."""
    run(python, "-m", "venv", folder)
    return folder / "bin/python"


def try_wheel(python: str, wheel: Path, folder: Path) -> None:
    """Without a compiler, and without the package's own dependencies but the one that importing it needs."""
    clean = environment(python, folder)
    path = str(clean.parent)
    run(clean, "-m", "pip", "install", "--quiet", "--no-deps", wheel, "packaging", PATH=path)
    print(run(clean, "-I", TOOLS / "try_wheel.py", PATH=path))
    run(clean, "-m", "pip", "install", "--quiet", "mypy", PATH=path)
    print(run(clean, "-I", TOOLS / "check_stub.py", PATH=path), flush=True)


def make_wheel(python: str, source: Path, flags: str, out: Path) -> None:
    """One wheel, from the source distribution to the tried file in `out`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(environment(python, folder / "builder"), source, flags, folder)
        print(run(sys.executable, TOOLS / "check_wheel.py", wheel))
        try_wheel(python, wheel, folder / "clean")
        shutil.copy(wheel, out)
    print(f"{wheel.name}: {size_of(out / wheel.name)} bytes, {time.monotonic() - start:.0f} s", flush=True)


def size_of(path: Path) -> int:
    return path.stat().st_size


def main(pythons: list[str]) -> None:
    out = ROOT / "wheelhouse"
    shutil.rmtree(out, ignore_errors=True)
    sdist = build_sdist(out)
    print(f"{sdist.name}: {size_of(sdist)} bytes")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as two_at_once:
        source, flags = unpacked(sdist, Path(name)), debian_headers(Path(name, "headers"))
        list(two_at_once.map(lambda python: make_wheel(python, source, flags, out), pythons or at_hand()))


if __name__ == "__main__":
    main(sys.argv[1:])
