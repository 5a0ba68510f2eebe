"""The extension, or what to do where it is not there."""

from __future__ import annotations

import subprocess
import sys


def test_an_extension_that_was_not_built_is_asked_for() -> None:
    program = """
import sys
sys.modules["pyint8._core"] = None
import pyint8
from pyint8.errors import MissingDependencyError
try:
    from pyint8.streaming import extension
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "extension is not built here. Install the package (`pip install .` in its source tree)" in done.stdout
