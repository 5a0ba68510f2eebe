"""What builds and checks wheels is tested in the source tree, and without torch: `make build-wheels` begins with it."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "csrc")]
