"""pyint8 beside its peers. Run from the source tree, with pyint8 installed: `python -m benchmarks -h`."""

import sys
from pathlib import Path

# The tree's own pyint8/ folder has no compiled extension: let the installed one come first.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT] + [str(_ROOT)]
