"""On which releases of what it stands on pyint8 works: `make transformers-matrix [RELEASES="lowest 5.23.0 highest"]`.

Each row is installed into the environment that this runs in, one after the other: a release of transformers; "lowest",
the oldest torch, bitsandbytes, accelerate and transformers that the package allows, together; "highest", the newest.
Without RELEASES: lowest, the newest patch of every minor release of transformers, highest. With each, the tests run
that compare with transformers, on a few architectures, and those of adapters, drop-in loads, saving, converting and
reloading.
Ends with a table, and with status 1 if something failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PARTNERS = ("torch", "bitsandbytes", "accelerate", "transformers")
ARCHITECTURES = "llama or gpt2 or t5 or mixtral or llava"
CONTRACT = ROOT / "tests/contract"
BY_ARCHITECTURE = ("identity", "converted", "reloaded", "saved", "inspected")
SUITE = [
    *(str(CONTRACT / f"test_{name}.py") for name in ("adapters", "drop_in", "ordinary_model", *BY_ARCHITECTURE)),
    "-k",
    f"not ({' or '.join(f'test_{name}' for name in BY_ARCHITECTURE)}) or ({ARCHITECTURES})",
    "-W",
    "default",
]


def pip(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-500:])
    return done.stdout


def allowed() -> dict[str, Requirement]:
    """What the package says of those that it stands on."""
    needs = map(Requirement, metadata.requires("pyint8") or [])
    return {need.name: need for need in needs if need.name in PARTNERS}


def transformers_releases() -> list[str]:
    """The newest patch of each minor release in the range that the package allows."""
    found = re.search(r"Available versions: (.*)", pip("index", "versions", "transformers"))
    assert found is not None
    newest: dict[tuple[int, ...], Version] = {}
    for version in map(Version, found[1].split(", ")):
        if version in allowed()["transformers"].specifier:
            newest[version.release[:2]] = max(version, newest.get(version.release[:2], version))
    return [str(version) for version in sorted(newest.values())]


def lowest(need: Requirement) -> str:
    (version,) = (bound.version for bound in need.specifier if bound.operator == ">=")
    return f"{need.name}=={version}"


def install(row: str) -> None:
    """Makes the environment that of a row.

    Raises:
        RuntimeError: pip cannot.
    """
    if row == "lowest":
        pip("install", *map(lowest, allowed().values()))
    elif row == "highest":
        pip("install", "--upgrade", *map(str, allowed().values()))
    else:
        pip("install", f"transformers=={row}")


def versions() -> list[str]:
    """Of the partners as they are installed."""
    return [f"{name}=={metadata.version(name)}" for name in PARTNERS]


def run(row: str) -> tuple[str, list[str]]:
    """What was installed and pytest's last line for a row, and what failed."""
    try:
        install(row)
    except RuntimeError as error:
        return "cannot be installed", [str(error)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *SUITE],
        cwd="/",
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    said = f"{lines[-1].strip('= ')} ({', '.join(versions())})"
    return said, failed or ([] if done.returncode == 0 else lines[-20:])


def main(rows: list[str]) -> int:
    before = versions()
    results: dict[str, tuple[str, list[str]]] = {}
    try:
        for row in rows or ["lowest", *transformers_releases(), "highest"]:
            results[row] = run(row)
            print(f"{row:<10} {results[row][0]}", flush=True)
    finally:
        pip("install", *before)
    for row, (_, failed) in results.items():
        for line in failed:
            print(f"{row:<10} {line[:200]}")
    return any(failed for _, failed in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
