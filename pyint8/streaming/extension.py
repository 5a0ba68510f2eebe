"""The compiled extension, or an error that says how to get it."""

from pyint8.errors import MissingDependencyError

try:
    from pyint8 import _core
except ImportError as error:
    raise MissingDependencyError(
        "pyint8's extension is not built here. Install the package (`pip install .` in its source tree) and, if you "
        f"did, do not run Python inside the source tree, whose pyint8/ folder hides the installed one ({error})."
    ) from error

__all__ = ["_core"]
