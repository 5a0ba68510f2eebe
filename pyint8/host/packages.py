"""Which versions of other packages are installed."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from packaging.version import Version


def installed_version(package: str) -> Version | None:
    """The version of an installed distribution; None where it is absent."""
    try:
        return _version(package)
    except metadata.PackageNotFoundError:
        return None


def forget_versions() -> None:
    """For a caller who is told to install another version, does so, and tries again."""
    _version.cache_clear()


@cache  # a load asks seven times, and each time would parse a file
def _version(package: str) -> Version:
    return Version(metadata.version(package))
