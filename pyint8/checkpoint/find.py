"""From what a user names to a checkpoint: a folder, a file, a hub id, an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pyint8.errors import (
    CheckpointNotFoundError,
    MissingDependencyError,
    ModelNotSupportedError,
    OptionError,
    Pyint8Error,
)

from .index import Checkpoint, open_checkpoint


def check_path(path: str, *, is_plain: bool) -> None:
    """Refuses what is neither a folder nor can be a hub id; a single file is enough for a module of one's own."""
    if os.path.isfile(path) and not is_plain:
        raise OptionError(f"{path} is a file; give the folder with its config.json, or pass model=module to fill one")
    if not os.path.exists(path) and (path.startswith((".", "~", os.sep)) or path.count("/") > 1 or not path):
        raise CheckpointNotFoundError("there is no such folder, and it cannot be a hub id; check the path", path=path)


def base_of_adapter(path: str, kwargs: Mapping[str, Any]) -> str | None:
    """The base model that a folder with nothing but a PEFT adapter names; None for other folders."""
    folder = os.path.join(path, kwargs.get("subfolder") or "")
    description = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(description) or os.path.exists(os.path.join(folder, "config.json")):
        return None
    if find_spec("peft") is None:
        raise MissingDependencyError(f"{folder} holds a PEFT adapter, which needs peft: `pip install peft`")
    try:
        with open(description, encoding="utf-8") as file:
            base = json.load(file)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelNotSupportedError(
            f"{description} names no base model; load that with pyint8, then model.load_adapter({folder!r})"
        ) from error
    return str(base)


def find_checkpoint(path: str, kwargs: Mapping[str, Any]) -> Checkpoint | None:
    """A folder's (or a file's) checkpoint; of a hub id what the local cache has, if anything.

    transformers decides later whether that is up to date, and downloads what is missing.
    """
    where = {name: kwargs[name] for name in ("subfolder", "variant", "use_safetensors") if kwargs.get(name) is not None}
    if os.path.exists(path):
        named = _weights_named_in_config(os.path.join(path, kwargs.get("subfolder") or ""))
        return open_checkpoint(path, **where) if named is None else open_checkpoint(named)

    try:
        config = cached_file(path, "config.json", kwargs)
        return None if config is None else open_checkpoint(os.path.dirname(config), **where)
    except (Pyint8Error, ValueError):  # whoever needs it will say what is wrong
        return None


def cached_file(hub_id: str, file: str, kwargs: Mapping[str, Any]) -> str | None:
    """The path of a repository's file in the local cache; None if it is not there.

    Raises:
        ValueError: `hub_id` can be none.
    """
    from huggingface_hub import try_to_load_from_cache

    where = {name: kwargs[name] for name in ("cache_dir", "revision") if kwargs.get(name) is not None}
    found = try_to_load_from_cache(hub_id, file, **where)
    return found if isinstance(found, str) else None


def _weights_named_in_config(folder: str) -> str | None:
    """The file, or index, that the configuration's `transformers_weights` puts in place of the usual ones."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            name = json.load(file)["transformers_weights"]
        path = os.path.normpath(os.path.join(folder, name))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_inside = os.path.commonpath([os.path.abspath(folder), os.path.abspath(path)]) == os.path.abspath(folder)
    return path if is_inside else None  # transformers refuses it
