"""libFuzzer on a judge of checkpoints, by atheris: `fuzz_checkpoints.py JUDGE [libFuzzer's arguments]`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["pyint8.checkpoint", "pyint8.host.files", "zipfile", "json"]):
    import zipfile  # noqa: F401

    import pyint8.checkpoint  # noqa: F401

from judges import judged


def main() -> None:
    name = sys.argv.pop(1)

    def test_one_input(raw: bytes) -> None:
        judged(name, raw)

    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


main()
