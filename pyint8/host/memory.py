"""Memory of this host and of this process."""

from __future__ import annotations

import resource


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
