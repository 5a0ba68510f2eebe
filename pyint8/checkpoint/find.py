"""From what a user names to a checkpoint: a folder, a file, a hub id, an adapter."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from pyint8.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    MissingDependencyError,
    ModelNotSupportedError,
    OptionError,
    Pyint8Error,
)
from pyint8.host.files import exists, is_file, is_folder, open_file, require_files

from ._reading import os_errors
from .checksums import CHECKSUMS
from .index import Checkpoint, open_checkpoint

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Where a checkpoint is found, as from_pretrained names it."""
FILE_ARGUMENTS = (*HUB_ARGUMENTS, "variant", "use_safetensors")
"""The same, and which of its files are taken."""
CODE_ARGUMENTS = ("trust_remote_code", "code_revision")
"""Whether code that comes with it is run, and which."""

_SNAPSHOT = re.compile(
    r"(?P<cache>.*)/models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<inside>.+))?", re.DOTALL
)


def check_path(path: str, kwargs: Mapping[str, Any], *, is_plain: bool) -> None:
    """Refuses what is neither a folder nor can be a hub id; a single file is enough for a module of one's own.

    A name such as "models/llama" could be both. Where there is a folder "models" here, and neither a "llama" in it nor
    such a repository in the local cache, it is taken for a mistyped folder: asking the hub would take long.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{path!r} is not UTF-8, and safetensors opens no such paths; rename the folder") from None
    _refuse_pipes(path, kwargs.get("subfolder") or "")
    if is_file(path) and not is_plain:
        raise OptionError(f"{path} is a file; give the folder with its config.json, or pass model=module to fill one")
    if not exists(path) and (path.startswith((".", "~", os.sep)) or path.count("/") > 1 or not path):
        raise CheckpointNotFoundError("there is no such folder, and it cannot be a hub id; check the path", path=path)
    if not exists(path) and not any(kwargs.get(name) is not None for name in HUB_ARGUMENTS):
        _refuse_mistyped_folder(path, kwargs)


def _refuse_pipes(path: str, subfolder: str) -> None:
    for folder in (path, os.path.join(path, subfolder)):
        if is_folder(folder):
            with os_errors(folder):
                require_files(folder)


def _refuse_mistyped_folder(path: str, kwargs: Mapping[str, Any]) -> None:
    parent, name = os.path.split(path)
    if not parent or not is_folder(parent) or _is_cached(path, kwargs):
        return
    near = difflib.get_close_matches(name, os.listdir(parent), n=1)
    meant = f"did you mean {os.path.join(parent, near[0])}?" if near else "check the path."
    raise CheckpointNotFoundError(
        f"the folder {parent} has no {name} in it; {meant} (For the hub's repository of that name, download it first, "
        f'`hf download {path}`, or say so with revision="main")',
        path=path,
    )


def _is_cached(hub_id: str, kwargs: Mapping[str, Any]) -> bool:
    try:
        return any(cached_file(hub_id, name, kwargs) for name in ("config.json", "adapter_config.json"))
    except ValueError:  # no hub id
        return False


@contextmanager
def named_by_adapter(adapter: str, base: str) -> Iterator[None]:
    """Errors within are of `base`; where an adapter names it, they say so."""
    try:
        yield
    except Pyint8Error as error:
        if adapter != base:
            error.problem += f". The adapter {adapter} names it: base_model_name_or_path in its adapter_config.json"
        raise


def base_of_adapter(path: str, kwargs: Mapping[str, Any]) -> str | None:
    """The base model that an adapter of PEFT's names, if that is what `path` is; None for a model.

    Raises:
        MissingDependencyError: It is one, and peft is not installed.
        ModelNotSupportedError: It names no base model.
    """
    description = _adapter_config(path, kwargs)
    if description is None:
        return None
    if find_spec("peft") is None:
        raise MissingDependencyError(f"{path} holds a PEFT adapter, which needs peft: `pip install peft`")
    _refuse_pickled_adapter(os.path.dirname(description), kwargs)
    try:
        described = _json_in(description)
        base = described["base_model_name_or_path"]
    except (ValueError, RecursionError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise ModelNotSupportedError(
            f"{description} names no base model; load that with pyint8, then model.load_adapter({path!r})"
        )
    if not isinstance(described.get("peft_type"), str):
        raise ModelNotSupportedError(f"{description} names no kind of adapter (`peft_type`); save the adapter again")
    with named_by_adapter(path, base):
        check_path(base, kwargs, is_plain=False)
    return base


def _refuse_pickled_adapter(folder: str, kwargs: Mapping[str, Any]) -> None:
    """Of a folder of its own; transformers, which loads adapters, looks for adapter_model.safetensors there alone."""
    names = [os.path.join(folder, f"adapter_model.{format}") for format in ("safetensors", "bin")]
    has_safetensors, has_pickle = map(exists, names)
    if has_pickle and not has_safetensors and kwargs.get("use_safetensors") is not False:
        raise ModelNotSupportedError(
            'transformers loads no adapter from a pickle; convert it, in its folder: python -c "import torch, '
            "safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')\"",
            path=names[1],
        )


def _adapter_config(path: str, kwargs: Mapping[str, Any]) -> str | None:
    """The adapter_config.json of a folder without a config.json, or of a hub id, by transformers' rule.

    The hub is asked only for repositories that are not in the local cache.
    """
    given = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
    where = {name: given[name] for name in HUB_ARGUMENTS if given.get(name) is not None}
    inside = f"{where['subfolder']}/" if where.get("subfolder") else ""
    name = f"{inside}adapter_config.json"
    if exists(path):
        has_model = exists(os.path.join(path, "config.json"))
        return os.path.join(path, name) if not has_model and exists(os.path.join(path, name)) else None
    try:
        cached = cached_file(path, name, where)
        is_known = cached is not None or cached_file(path, f"{inside}config.json", where) is not None
        if is_known or find_spec("peft") is None:
            return cached
    except ValueError:  # no hub id
        return None
    return _downloaded(path, name, where)


def _downloaded(hub_id: str, file: str, where: Mapping[str, Any]) -> str | None:
    """The path of a repository's file once it is in the local cache; None where the hub has none, or gives none.

    Asking for the configuration later reports what is wrong.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    try:
        found = hf_hub_download(hub_id, file, **{name: where[name] for name in names if name in where})
    except (OSError, ValueError, EntryNotFoundError):
        return None
    return str(found)


def fetch_checksums(files: Iterable[str], path: str, kwargs: Mapping[str, Any]) -> None:
    """Downloads the checksums that lie beside weights, which from_pretrained does not; where there are none, nothing.

    Args:
        files: The weights, where from_pretrained has just found or downloaded them.
        path: What it was called with: of a hub id they are in the cache.
        kwargs: Its arguments: `token` and `local_files_only` count.
    """
    folders = {os.path.dirname(file) for file in files}
    for cached in filter(None, map(_SNAPSHOT.fullmatch, folders)) if path and not exists(path) else ():
        where = {name: kwargs[name] for name in ("token", "local_files_only") if kwargs.get(name) is not None}
        where |= {"cache_dir": cached["cache"], "revision": cached["commit"]}
        _downloaded(cached["id"].replace("--", "/"), os.path.join(cached["inside"] or "", CHECKSUMS), where)


def find_checkpoint(
    path: str, kwargs: Mapping[str, Any], problems: list[Pyint8Error] | None = None
) -> Checkpoint | None:
    """A folder's (or a file's) checkpoint; of a hub id what the local cache has, if anything.

    transformers decides later whether that is up to date, and downloads what is missing.

    Args:
        path: Folder, file or hub id.
        kwargs: `subfolder`, `variant`, `use_safetensors`, and for the hub `cache_dir`, `revision` and `force_download`,
            with which the cache has nothing of use.
        problems: See `open_checkpoint`.
    """
    names = ("subfolder", "variant", "use_safetensors")
    where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    if exists(path):
        named = _weights_named_in_config(os.path.join(path, kwargs.get("subfolder") or ""))
        where = where if named is None else {}
        return open_checkpoint(named or path, problems=problems, **where)

    if kwargs.get("force_download"):
        return None
    try:
        config = cached_file(path, "config.json", kwargs)
        return None if config is None else open_checkpoint(os.path.dirname(config), problems=problems, **where)
    except (Pyint8Error, ValueError):  # the load itself reports it
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


def configuration_file(path: str, kwargs: Mapping[str, Any]) -> str | None:
    """The path of a model's config.json, in its folder or the local cache; None if there is none."""
    inside = os.path.join(kwargs.get("subfolder") or "", "config.json")
    try:
        file = os.path.join(path, inside) if exists(path) else cached_file(path, inside, kwargs)
    except ValueError:  # no hub id
        return None
    return file if file is not None and is_file(file) else None


def configuration(path: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The path and the content of a model's config.json, in its folder or the local cache; None if there is none.

    Raises:
        CheckpointError: It is no JSON object.
    """
    file = configuration_file(path, kwargs)
    if file is None:
        return None
    try:
        content = _json_in(file)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the configuration is no JSON ({error}); download it again", path=file) from None
    if not isinstance(content, dict):
        raise CheckpointError("the configuration is no JSON object; download it again", path=file)
    return file, content


def _json_in(path: str) -> Any:
    with os_errors(path), open_file(path) as file:
        raw = file.read()
    return json.loads(raw.decode("utf-8"))


def _weights_named_in_config(folder: str) -> str | None:
    """The file, or index, that the configuration's `transformers_weights` puts in place of the usual ones."""
    try:
        name = _json_in(os.path.join(folder, "config.json"))["transformers_weights"]
        path = os.path.normpath(os.path.join(folder, name))
    except (ValueError, RecursionError, KeyError, TypeError):  # no such file is one too
        return None
    is_inside = os.path.commonpath([os.path.abspath(folder), os.path.abspath(path)]) == os.path.abspath(folder)
    return path if is_inside else None  # transformers refuses it
