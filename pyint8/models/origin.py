"""Where models were loaded from, for as long as they live: what lies beside their weights is saved along with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from pyint8.checkpoint.side_files import is_of_a_save


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from.

    Attributes:
        name: The model's `name_or_path` then; None if it has none.
        folder: That of its configuration, absolute.
        files: Those of its weights, absolute.
    """

    name: str | None
    folder: str
    files: tuple[str, ...]

    def lost_in(self, folder: str) -> list[str]:
        """Those of its files that a save to `folder` would remove, or leave without their configuration."""
        target = os.path.realpath(folder)
        if self.name is not None and os.path.realpath(self.folder) == target:
            return list(self.files)
        return [file for file in self.files if target in _homes(file) and is_of_a_save(os.path.basename(file))]


def _homes(file: str) -> set[str]:
    """Where a file is, and where it is if that is a link."""
    return {os.path.realpath(os.path.dirname(file)), os.path.dirname(os.path.realpath(file))}


# By model; its copies have none. What it was loaded from, and what it has its values from since.
_origins: WeakKeyDictionary[Any, Origin] = WeakKeyDictionary()
_reloads: WeakKeyDictionary[Any, Origin] = WeakKeyDictionary()


def origin(model: Any, files: Iterable[str], folder: str | None = None) -> Origin:
    """Where a model is from.

    Args:
        model: Any.
        files: Of its weights.
        folder: Of its configuration; None for the one from which that names these files.
    """
    paths = tuple(map(os.path.abspath, files))
    home = _home(model, paths[0]) if folder is None else os.path.abspath(folder)
    return Origin(getattr(model, "name_or_path", None), home, paths)


def _home(model: Any, weights: str) -> str:
    folder = os.path.dirname(weights)
    named = getattr(getattr(model, "config", None), "transformers_weights", None)
    inside = os.path.dirname(os.path.normpath(named)) if isinstance(named, str) else ""
    return folder.removesuffix(os.sep + inside) if inside else folder


def remember_origin(model: Any, files: Iterable[str], folder: str | None = None) -> None:
    """Notes where a model was loaded from (see `origin`)."""
    _origins[model] = origin(model, files, folder)


def remember_reload(model: Any, files: Iterable[str]) -> None:
    """Notes where a model has the values from that it has now."""
    _reloads[model] = origin(model, files)


def reloaded_from(model: Any) -> Origin | None:
    """Where a model has its values from, if it was reloaded."""
    return _reloads.get(model)


def origin_of(model: Any) -> Origin | None:
    """Where a model was loaded from; None if that is not known, or its name says that it is another's now."""
    found = _origins.get(model)
    return found if found is not None and found.name == getattr(model, "name_or_path", None) else None
