"""Fuzzing for as long as one likes: `fuzz.py BUILD SECONDS [TARGET ...]`, which `make fuzz` runs.

Each target begins with what tests/corpus has for it. What it finds worth keeping is left in BUILD/corpus, and inputs
that something is wrong with are BUILD/<target>-crash-*. `fuzz.py --keep BUILD [TARGET ...]` writes the smallest inputs
that reach all that was reached to tests/corpus.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CORPUS = TESTS / "corpus"
NATIVE = ("plan", "file", "engine", "consumer")
JUDGES = ("header", "index", "archive", "pickled")
LONGEST = {"archive": 4000, "header": 2000}
MOST_KEPT = {"archive": 24_000}
"""Bytes of a target's inputs, those that were there before first, then the smallest; 12,000 for the others."""


def program(target: str, build: Path) -> list[str]:
    if target in NATIVE:
        return [str(build / "tests" / "cpp" / "fuzz" / f"fuzz_{target}")]
    return [sys.executable, str(TESTS / "support" / "fuzz_checkpoints.py"), target]


def environment(target: str, build: Path) -> dict[str, str]:
    """Tests stand before functions of libc, and want AddressSanitizer behind them, so it comes first."""
    if target in NATIVE:
        cache = (build / "CMakeCache.txt").read_text()
        found = re.search(r"^PYINT8_ASAN_LIBRARY:\w+=(.+)$", cache, re.MULTILINE)
        return {**os.environ, "LD_PRELOAD": found[1] if found else ""}
    scratch = build / "scratch"
    scratch.mkdir(exist_ok=True)
    path = os.pathsep.join([str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "PYINT8_FUZZ_FOLDER": str(scratch)}


def inputs(target: str) -> list[bytes]:
    lines = (CORPUS / f"{target}.txt").read_text().splitlines()
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]


def unpacked(target: str, build: Path) -> Path:
    """The target's corpus as libFuzzer wants it: a folder of files."""
    folder = build / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(inputs(target)):
        (folder / f"kept-{number}").write_bytes(raw)
    return folder


def run(target: str, build: Path, arguments: Sequence[str]) -> int:
    command = [*program(target, build), f"-artifact_prefix={build}/{target}-", *arguments]
    return subprocess.run(command, cwd=build, env=environment(target, build)).returncode


def fuzz(target: str, build: Path, seconds: int) -> bool:
    """Whether nothing was found."""
    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST.get(target, 500)}", "-timeout=60", "-rss_limit_mb=4096"]
    print(f"=== {target}", flush=True)
    return run(target, build, [*limits, "-print_final_stats=1", "-verbosity=0", str(unpacked(target, build))]) == 0


def keep(target: str, build: Path) -> None:
    """Rewrites the target's corpus, its remarks and what follows each of them first."""
    merged = unpacked(target, build)
    if target in NATIVE:  # atheris cannot
        merged = build / "merged" / target
        merged.mkdir(parents=True, exist_ok=True)
        run(target, build, ["-merge=1", "-verbosity=0", str(merged), str(unpacked(target, build))])
    before = set(inputs(target))
    lines = (CORPUS / f"{target}.txt").read_text().splitlines()
    first = next((at for at, line in enumerate(lines) if line.startswith("#")), len(lines))
    kept, room = lines[first:], MOST_KEPT.get(target, 12_000)
    found = {path.read_bytes() for path in merged.iterdir()}
    for raw in sorted(found, key=lambda raw: (raw not in before, len(raw), raw)):
        room -= len(raw)
        if room > 0 and raw.hex() not in kept:
            kept.insert(len(kept) - len(lines[first:]), raw.hex())
    (CORPUS / f"{target}.txt").write_text("".join(f"{line}\n" for line in kept))


def main(arguments: list[str]) -> int:
    is_kept = arguments[0] == "--keep"
    build = Path(arguments[1] if is_kept else arguments[0]).resolve()
    targets = arguments[2:] or [*NATIVE, *JUDGES]
    if is_kept:
        for target in targets:
            keep(target, build)
        return 0
    found = [target for target in targets if not fuzz(target, build, int(arguments[1]))]
    print(f"found in: {', '.join(found)}" if found else "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
