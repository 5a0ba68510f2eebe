"""On which of transformers' releases the identity suite holds: `make transformers-matrix [RELEASES="5.8.0 5.23.0"]`.

Installs them one after the other into the environment it runs in, the newest patch of every minor release that the
package allows, and runs the suite on a few architectures with each. Ends with a table, and with status 1 if something
failed.
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
ARCHITECTURES = "llama or gpt2 or t5 or mixtral or llava"
SUITE = [str(ROOT / "tests/contract/test_identity.py"), "-k", f"test_identity and ({ARCHITECTURES})"]


def pip(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-500:])
    return done.stdout


def allowed_releases() -> list[str]:
    """The newest patch of each minor release in the range that the package allows."""
    needs = map(Requirement, metadata.requires("pyint8") or [])
    allowed = next(need.specifier for need in needs if need.name == "transformers")
    found = re.search(r"Available versions: (.*)", pip("index", "versions", "transformers"))
    assert found is not None
    newest: dict[tuple[int, ...], Version] = {}
    for version in map(Version, found[1].split(", ")):
        if version in allowed:
            newest[version.release[:2]] = max(version, newest.get(version.release[:2], version))
    return [str(version) for version in sorted(newest.values())]


def run(release: str) -> tuple[str, list[str]]:
    """pytest's last line for a release, and what failed."""
    try:
        pip("install", f"transformers=={release}")
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
    return lines[-1].strip("= "), failed or ([] if done.returncode == 0 else lines[-20:])


def main(releases: list[str]) -> int:
    before = metadata.version("transformers")
    results: dict[str, tuple[str, list[str]]] = {}
    try:
        for release in releases or allowed_releases():
            results[release] = run(release)
            print(f"{release:<10} {results[release][0]}", flush=True)
    finally:
        pip("install", f"transformers=={before}")
    for release, (_, failed) in results.items():
        for line in failed:
            print(f"{release:<10} {line[:200]}")
    return any(failed for _, failed in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
