"""What is in a checkpoint, what would become int8, and what that would take: `pyint8.inspect`. No tensor is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.find import base_of_adapter, cached_file, check_path, find_checkpoint
from pyint8.checkpoint.shards_writer import file_sizes
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import CheckpointNotFoundError, OptionError
from pyint8.host import garbage
from pyint8.host.files import exists
from pyint8.host.imports import importing
from pyint8.models.keywords import FINDING, called, int8_config, refuse_others
from pyint8.models.transformers.parallel import refuse_split_models
from pyint8.models.transformers.releases import require_transformers
from pyint8.operations.common import check_whereabouts, decoded, located
from pyint8.remote.objects import url_of
from pyint8.report import Recorder

if TYPE_CHECKING:
    import torch

    from pyint8.models.request import LoadRequest

_HEADERS_ALONE = "headers alone were asked for"
_OF_A_MODEL = ("device_map", "max_memory", "headroom", "dtype", "config")
_NO_CONFIG = "there is no config.json, so nothing says what would become int8; these are the headers' facts alone"


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor as the checkpoint has it.

    Attributes:
        name: Its name there.
        dtype: The format's name of its dtype, such as "BF16".
        shape: In elements.
        nbytes: How many bytes it has.
        file: The file that holds it.
        offset: Where its first byte lies, in bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int


@dataclass(frozen=True)
class Inspection:
    """Returned by `pyint8.inspect`. Sizes are in bytes; devices are named as in `max_memory`: "0", "cpu", "disk".

    Attributes:
        path: What was inspected.
        files: The files with tensors.
        nbytes: Of all tensors.
        dtypes: Of the tensors of each dtype.
        tensors: All of them, in order of file and offset.
        model: The model's class; None where only headers were looked at, and all that follows is empty.
        note: Why that is so; None for a model.
        int8: The modules that become int8 (or are), by name.
        skipped: What of a weight's size is not int8, with the reason, as in `LoadReport.skipped`.
        skipped_bytes: What each of these takes.
        int8_kinds: Of the int8 checkpoint, by kind: "int8", "scales", "formats" and "unquantized".
        int8_files: Sizes of the files that `pyint8.convert` writes, by name; none if nothing becomes int8.
        ties_assumed: Parameters that the checkpoint has twice, and the model wants to share: taken to be the same,
            which only their values would show.
        device_map: Modules to devices, as `pyint8.load` would place them with this memory.
        device_bytes: What of the model goes to each device.
        device_memory: What the plan could use of each: `max_memory`, or what is free.
        problem: Why `pyint8.load` would refuse that; None if it fits.
    """

    path: str
    files: tuple[str, ...]
    nbytes: int
    dtypes: Mapping[str, int]
    tensors: tuple[InspectedTensor, ...]
    model: str | None = None
    note: str | None = None
    int8: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    skipped_bytes: Mapping[str, int] = field(default_factory=dict)
    int8_kinds: Mapping[str, int] = field(default_factory=dict)
    int8_files: Mapping[str, int] = field(default_factory=dict)
    ties_assumed: Mapping[str, str] = field(default_factory=dict)
    device_map: Mapping[str, str] = field(default_factory=dict)
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    device_memory: Mapping[str, int] = field(default_factory=dict)
    problem: str | None = None

    @property
    def int8_nbytes(self) -> int | None:
        """Of all tensors of the int8 checkpoint; None if nothing becomes int8."""
        return sum(self.int8_kinds.values()) if self.int8_kinds else None

    @property
    def fits(self) -> bool | None:
        """Whether `pyint8.load` would place it; None where only headers were looked at."""
        return None if self.model is None else self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """Everything, the properties included, as JSON has it."""
        return {**asdict(self), "int8_nbytes": self.int8_nbytes, "fits": self.fits}


def inspect(
    path: str | os.PathLike[str],
    *,
    device_map: str = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    headroom: int | str | None = None,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    config: Int8Config | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **hub_and_model_kwargs: Any,
) -> Inspection:
    """Tell what is in a checkpoint, what of it would become int8, and what that would take, without reading a tensor.

    Everything is decided as `pyint8.load` and `pyint8.convert` decide it, by transformers' own planner too. No GPU is
    needed, and nothing is downloaded. Of a file, or of a folder without a config.json, only headers are looked at, and
    arguments about a model are refused.

    Args:
        path: A folder, a file, a hub id that is in the local cache, or a URL (see `pyint8.load`) of a folder or a file.
        device_map: How to place it: "auto", "balanced", "balanced_low_0" or "sequential".
        max_memory: Memory to use on each device, which need not be of this machine; None for what is free here.
        headroom: Use all memory of every GPU but this much, as in `pyint8.load`.
        dtype: As in `pyint8.load`.
        config: What to quantize.
        storage_options: For a URL, as in `pyint8.load`.
        hub_and_model_kwargs: For `from_pretrained`: revision, subfolder, trust_remote_code and so on.

    Raises:
        Pyint8Error: One of `pyint8.errors`.
    """
    source, config = decoded(path), int8_config(config)
    check_whereabouts(storage_options, hub_and_model_kwargs, source)
    if config is not None and config.has_fp16_weight:
        raise OptionError("config has has_fp16_weight, which keeps weights in 16 bit: nothing would become int8")
    with (
        called("inspect", hub_and_model_kwargs),
        located(source, hub_and_model_kwargs, storage_options) as name,
    ):
        if not _has_config(name, hub_and_model_kwargs):
            given: tuple[Any, ...] = (device_map, max_memory, headroom, dtype, config)
            asked = dict(zip(_OF_A_MODEL, given, strict=True))
            return inspect_headers(name, note=_NO_CONFIG, **asked, **hub_and_model_kwargs)
        require_transformers()
        refuse_split_models(hub_and_model_kwargs)
        _found(name, hub_and_model_kwargs, is_plain=False)
        with importing:
            import pyint8.models.transformers.inspecting  # noqa: F401
        budget = _budget(device_map, max_memory, headroom)
        arguments = {"local_files_only": True, **hub_and_model_kwargs}
        return _inspect_model(_request(name, dtype, config, budget, arguments), device_map)


def inspect_headers(
    path: str | os.PathLike[str],
    *,
    note: str = _HEADERS_ALONE,
    storage_options: Mapping[str, Any] | None = None,
    **hub_and_model_kwargs: Any,
) -> Inspection:
    """Tell what headers say; imports neither torch nor transformers.

    Args:
        path: As in `inspect`.
        note: Why it is headers alone.
        storage_options: As in `inspect`.
        hub_and_model_kwargs: As in `inspect`; what is about a model is refused, but for the defaults.

    Raises:
        Pyint8Error: One of `pyint8.errors`.
    """
    source = decoded(path)
    check_whereabouts(storage_options, hub_and_model_kwargs, source)
    _refuse_unanswered(hub_and_model_kwargs, note)
    with located(source, hub_and_model_kwargs, storage_options) as name:
        return Inspection(note=note, **_facts(name, _found(name, hub_and_model_kwargs, is_plain=True)))


def _refuse_unanswered(arguments: Mapping[str, Any], note: str) -> None:
    """Refuses what is about a model, of which headers know nothing."""
    for name, value in arguments.items():
        if name in _OF_A_MODEL and value not in (None, "auto"):
            raise OptionError(f"{name} is about a model: {note}; leave it out")
    refuse_others("inspect", arguments, (*FINDING, *_OF_A_MODEL), note)


def _found(path: str, arguments: Mapping[str, Any], *, is_plain: bool) -> Checkpoint:
    check_path(path, arguments, is_plain=is_plain)
    base = None if is_plain else base_of_adapter(path, arguments)
    if base is not None:
        raise OptionError(f"{path} is an adapter; inspect the model that it is for, {base}")
    with garbage.paused():
        checkpoint = find_checkpoint(path, arguments)
    if checkpoint is None:
        raise CheckpointNotFoundError(
            "there is no such folder, and the local cache has no whole checkpoint of a hub id of that name; check the "
            f"path, or download it first: `hf download {path}`",
            path=path,
        )
    return checkpoint


def _has_config(path: str, arguments: Mapping[str, Any]) -> bool:
    """Whether there is a configuration, of a model or an adapter; what is nowhere is left to be reported."""
    subfolder = arguments.get("subfolder") or ""
    if exists(path):
        names = ("config.json", "adapter_config.json")
        return any(exists(os.path.join(path, subfolder, name)) for name in names)
    try:
        return cached_file(path, os.path.join(subfolder, "config.json"), arguments) is not None
    except ValueError:  # no hub id
        return False


def _facts(path: str, checkpoint: Checkpoint) -> dict[str, Any]:
    nbytes: Counter[str] = Counter()
    for entry in checkpoint.values():
        nbytes[entry.dtype] += entry.nbytes
    tensors = tuple(
        InspectedTensor(entry.name, entry.dtype, entry.shape, entry.nbytes, url_of(entry.path), entry.offset)
        for entry in checkpoint.values()
    )
    return {
        "path": url_of(path),
        "files": tuple(map(url_of, checkpoint.files)),
        "nbytes": checkpoint.nbytes,
        "dtypes": dict(nbytes),
        "tensors": tensors,
    }


def _budget(device_map: Any, max_memory: Any, headroom: Any) -> Any:
    from pyint8.placement.budget import memory_budget
    from pyint8.placement.device_map import PLANNED_MAPS, is_planned

    if not is_planned(device_map):
        raise OptionError(f"device_map is {device_map!r}; what is to be planned is one of {', '.join(PLANNED_MAPS)}")
    return memory_budget(max_memory, headroom, device_map, StreamOptions.from_environment().device_bytes)


def _request(
    path: str, dtype: Any, config: Int8Config | None, budget: Any, arguments: Mapping[str, Any]
) -> LoadRequest:
    from pyint8.models.request import LoadRequest, check_dtype

    return LoadRequest(
        path=path,
        base=path,
        dtype=check_dtype(dtype),
        budget=budget,
        config=config,
        strict=config is None or config.strict,
        arguments=arguments,
    )


def _inspect_model(request: LoadRequest, plan: str) -> Inspection:
    from pyint8.models.transformers.inspecting import inspect_pretrained, kinds_of
    from pyint8.placement.budget import allowed_bytes

    with Recorder(False) as recorder:
        found = inspect_pretrained(request, plan, recorder)
    return Inspection(
        **_facts(request.path, found.load.checkpoint),
        model=found.class_name,
        int8=found.int8,
        skipped=recorder.report.skipped,
        skipped_bytes=recorder.report.skipped_bytes,
        int8_kinds={} if found.shards is None else kinds_of(found.shards),
        int8_files={} if found.shards is None else file_sizes(found.shards),
        ties_assumed=found.ties_assumed,
        device_map=found.placement.device_map,
        device_bytes=found.placement.nbytes,
        device_memory={str(device): size for device, size in allowed_bytes(request.budget).items()},
        problem=found.placement.problem,
    )
