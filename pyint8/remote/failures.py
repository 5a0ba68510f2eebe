"""What object stores and web servers answer, as errors of ours."""

from __future__ import annotations

import errno
import re
from typing import Any

from pyint8.errors import FileChangedError, Pyint8Error, RemoteError

_STATUS = re.compile(r"status code: (\d{3})")
_PASSING = (408, 425, 429)
_CREDENTIALS = (
    "check the credentials that this process has (the cloud's environment variables, files or metadata service, or "
    "storage_options=) and what they may read"
)


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error of obstore's tells of; None if there was no answer."""
    found = _STATUS.search(str(error))
    return None if found is None else int(found[1])


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    if type(error).__name__ != "GenericError":
        return isinstance(error, (ConnectionError, TimeoutError))
    status = status_of(error)
    return status is None or status >= 500 or status in _PASSING


def said(error: BaseException) -> str:
    """The gist of what obstore says, on one line; without queries, which may hold signatures."""
    text = " ".join(str(error).partition("Debug source")[0].split())
    return re.sub(r"\?[^\s\"')]+", "?...", text)[:300].rstrip(" :")


def changed(url: str, offset: int | None = None) -> FileChangedError:
    problem = "the object changed while it was read; load it again, once nothing writes to it"
    return FileChangedError(problem, path=url, offset=offset)


def failure(error: BaseException, url: str, offset: int | None = None) -> Pyint8Error:
    """The error of ours for one of obstore's.

    Args:
        error: Obstore's.
        url: Of the object or folder.
        offset: Of the first byte that did not come.
    """
    name = type(error).__name__
    where: dict[str, Any] = {"path": url, "offset": offset}
    if name == "PreconditionError":
        return changed(url, offset)
    if isinstance(error, FileNotFoundError) or status_of(error) == 404:
        return RemoteError("it is not there (any more); check the URL", **where, errno=errno.ENOENT)
    if isinstance(error, PermissionError) or name in ("PermissionDeniedError", "UnauthenticatedError"):
        return RemoteError(f"it may not be read: {said(error)}; {_CREDENTIALS}", **where, errno=errno.EACCES)
    if name == "NotSupportedError":
        problem = f"the server does not serve what is needed, ranges of files: {said(error)}; download the folder first"
        return RemoteError(problem, **where, errno=errno.ENOTSUP)
    if status_of(error) == 416:
        return changed(url, offset)
    if re.search(r"169\.254\.|metadata\.google|oauth2|redentials", said(error)):  # where clouds give them out
        return RemoteError(f"no credentials are found: {said(error)}; {_CREDENTIALS}", **where, errno=errno.EACCES)
    number = errno.ETIMEDOUT if re.search(r"Timeout|TimedOut|timed out", str(error)) else errno.EIO
    problem = f"cannot be read: {said(error)}; check the network and the server, then load again"
    return RemoteError(problem, **where, errno=number)
