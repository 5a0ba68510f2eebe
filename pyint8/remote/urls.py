"""What a URL may look like, and what of it is a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyint8.checkpoint.agreement import names_a_file
from pyint8.errors import OptionError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "https", "http")
_ADVICE = {"file": "give the path alone", "hf": "give the hub id alone", "memory": "there is nothing behind it"}
_FILES = (".safetensors", ".index.json")


@dataclass(frozen=True)
class RemotePath:
    """Where a checkpoint is.

    Attributes:
        folder: The URL of its folder, without a slash at the end.
        name: The one file that is meant; None for the folder.
    """

    folder: str
    name: str | None

    @property
    def title(self) -> str:
        """The last part of the folder, as the name of one here: without what the shell or a file system minds."""
        last = re.sub(r"[^\w.-]", "_", self.folder.rpartition("/")[2])[:100]
        return "model" if last.strip(".") == "" else last


def is_url(path: str) -> bool:
    """Whether it is written as a URL, of whatever scheme."""
    return _URL.match(path) is not None


def refuse_url(what: str, path: str) -> None:
    """Raises OptionError for the URL of what has to be on a disk here.

    Args:
        what: The argument's name.
        path: Its value.
    """
    if is_url(path):
        raise OptionError(f"{what} is {path}, which is no folder here; give a folder, and copy it there afterwards")


def parsed(url: str) -> RemotePath:
    """Where the checkpoint is.

    Raises:
        OptionError: The scheme is none that is known, or the URL has a part that would be ignored, or would show in
            messages.
    """
    match = _URL.fullmatch(url)
    assert match is not None
    scheme, rest = match["scheme"].lower(), match["rest"].rstrip("/")
    if scheme not in _SCHEMES:
        advice = _ADVICE.get(scheme, f"there are {', '.join(f'{each}://' for each in _SCHEMES)}")
        raise OptionError(f"path is {url!r}; pyint8 reads nothing from {scheme}://, {advice}")
    if scheme in ("http", "https") and "@" in rest.partition("/")[0]:
        raise OptionError(
            f"path is a {scheme} URL with a password; pass that with storage_options=, which no log shows"
        )
    if re.search(r"[?#\s\x00-\x1f\x7f]", rest):
        raise OptionError("path is a URL with a query, a fragment or blanks; give that of a folder alone")
    if not rest or any(part in (".", "..", "") for part in rest.split("/")):
        raise OptionError(f"path is {url!r}; give the URL of a folder, such as s3://bucket/folder")
    if rest.endswith(_FILES):
        folder, _, name = rest.rpartition("/")
        if folder:
            return RemotePath(f"{scheme}://{folder}", name)
    return RemotePath(f"{scheme}://{rest}", None)


def is_plain_name(name: str) -> bool:
    """Whether it names a file in its folder, and one that a file system here can have."""
    return names_a_file(name) and len(name.encode(errors="replace")) < 256
