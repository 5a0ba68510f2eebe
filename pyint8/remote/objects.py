"""Which files of which folders here stand for remote objects."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .store import RemoteObject

_lock = threading.Lock()
_objects: dict[str, RemoteObject] = {}  # by the real path of the file that stands for it
_folders: dict[str, str] = {}  # URLs, by the real path of the folder


def begin(folder: str, url: str, objects: dict[str, RemoteObject]) -> None:
    """From now on these files, by path, stand for objects, and the folder for a URL."""
    with _lock:
        _folders[folder] = url
        _objects.update(objects)


def end(folder: str) -> None:
    """Ends `begin`. Idempotent."""
    with _lock:
        _folders.pop(folder, None)
        for path in [path for path in _objects if path.startswith(folder + os.sep)]:
            del _objects[path]


def remote_object(path: str) -> RemoteObject | None:
    """The object that a file stands for; None for what is a file itself."""
    return _objects.get(os.path.realpath(path)) if _objects else None


def tag_of(path: str) -> str | None:
    """What distinguishes the state of that object from any other's; None for a file."""
    found = remote_object(path)
    return None if found is None else found.tag


def state_of(path: str) -> str | None:
    """The same without where it lies."""
    found = remote_object(path)
    return None if found is None else found.tag.removeprefix(found.url)


def url_of(text: str) -> str:
    """A path, or a text with paths, with the URLs that they stand for."""
    for folder, url in list(_folders.items()):
        text = text.replace(folder, url)
    return text


def _forget_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
