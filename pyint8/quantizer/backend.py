"""bitsandbytes, or an error that says how to get it."""

from pyint8.quantizer.requirements import require_packages

require_packages()

import bitsandbytes  # noqa: E402

__all__ = ["bitsandbytes"]
