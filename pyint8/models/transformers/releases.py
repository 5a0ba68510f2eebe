"""Which releases of transformers this package works with; importing this module does not import transformers."""

from __future__ import annotations

import logging

from packaging.version import Version

from pyint8.errors import DependencyVersionError, MissingDependencyError
from pyint8.host.packages import forget_versions, installed_version

logger = logging.getLogger(__name__)

LOWEST = "5.8"
"""The first release that lets a quantizer take part in renaming (`update_weight_conversions`)."""
KNOWN = "5.24"
"""The last minor release that the suite was run with."""
BELOW = "6"


def require_transformers() -> None:
    """Refuse a transformers that is absent, or of an unsupported release; does not import it.

    Raises:
        MissingDependencyError: It is absent.
        DependencyVersionError: It is too old or too new.
    """
    fix = f'`pip install "transformers>={LOWEST},<{BELOW}"`'
    version = installed_version("transformers")
    if version is None:
        raise MissingDependencyError(f"transformers models need transformers: {fix}")
    if not Version(LOWEST) <= version < Version(f"{BELOW}.dev0"):
        forget_versions()
        raise DependencyVersionError(
            f"transformers {version} is installed, and pyint8 works with {LOWEST} and later, below {BELOW}: {fix}"
        )
    if version.release[:2] > Version(KNOWN).release:
        logger.info("transformers %s is newer than the releases known to work, %s to %s", version, LOWEST, KNOWN)
