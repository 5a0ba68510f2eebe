"""Inputs of fuzzing, kept as text: one a line, in hexadecimal, so that a finding is a line of a diff.

A line that begins with # is a remark.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "corpus"


def inputs(name: str) -> list[bytes]:
    """Those of a target, in order; none if it has no file yet."""
    path = FOLDER / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]
