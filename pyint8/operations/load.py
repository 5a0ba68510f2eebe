"""From a path to a model: `pyint8.load`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from pyint8.checkpoint.find import base_of_adapter, check_path, find_checkpoint
from pyint8.config import Int8Config, StreamOptions
from pyint8.host import ending, garbage
from pyint8.host.imports import importing
from pyint8.host.processes import processes
from pyint8.models.keywords import called, int8_config
from pyint8.models.transformers.parallel import refuse_split_models
from pyint8.models.transformers.releases import require_transformers
from pyint8.operations.cached import cache_of, refuse_cache
from pyint8.operations.common import (
    check_options,
    check_whereabouts,
    decoded,
    joined_ranks,
    located,
    measured_memory,
    name_after,
    opened_engine,
    options_for,
    prepare,
    warn_of_own_values,
)
from pyint8.operations.wanted import Wanted
from pyint8.remote.urls import is_url, refuse_url
from pyint8.report import LoadReport, Recorder, announce

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

    from pyint8.models.request import LoadRequest
    from pyint8.streaming.preparation import Preparation

logger = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound="nn.Module")


@overload
def load(
    path: str | os.PathLike[str],
    device_map: Any = "auto",
    *,
    model: type[_Module] | _Module,
    return_report: Literal[False] = False,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    headroom: int | str | None = None,
    config: Int8Config | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    cache: bool | str | os.PathLike[str] = False,
    storage_options: Mapping[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
    **hub_and_model_kwargs: Any,
) -> _Module: ...
@overload
def load(
    path: str | os.PathLike[str],
    device_map: Any = "auto",
    *,
    model: type[_Module] | _Module,
    return_report: Literal[True],
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    headroom: int | str | None = None,
    config: Int8Config | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    cache: bool | str | os.PathLike[str] = False,
    storage_options: Mapping[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
    **hub_and_model_kwargs: Any,
) -> tuple[_Module, LoadReport]: ...
@overload
def load(
    path: str | os.PathLike[str],
    device_map: Any = "auto",
    *,
    model: type[Any] | None = None,
    return_report: Literal[False] = False,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    headroom: int | str | None = None,
    config: Int8Config | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    cache: bool | str | os.PathLike[str] = False,
    storage_options: Mapping[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
    **hub_and_model_kwargs: Any,
) -> PreTrainedModel: ...
@overload
def load(
    path: str | os.PathLike[str],
    device_map: Any = "auto",
    *,
    model: type[Any] | None = None,
    return_report: Literal[True],
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    headroom: int | str | None = None,
    config: Int8Config | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    cache: bool | str | os.PathLike[str] = False,
    storage_options: Mapping[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
    **hub_and_model_kwargs: Any,
) -> tuple[PreTrainedModel, LoadReport]: ...
def load(
    path: str | os.PathLike[str],
    device_map: Any = "auto",
    *,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    max_memory: Mapping[Any, Any] | None = None,
    headroom: int | str | None = None,
    config: Int8Config | None = None,
    model: nn.Module | type | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    strict: bool = True,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    cache: bool | str | os.PathLike[str] = False,
    storage_options: Mapping[str, Any] | None = None,
    return_report: bool = False,
    process_group: ProcessGroup | None = None,
    **hub_and_model_kwargs: Any,
) -> Any:
    """Load a Hugging Face checkpoint as a bitsandbytes int8 model.

    The result is byte for byte what transformers gives with `load_in_8bit=True` and the same dtype and device map.

    Args:
        path: A folder with a checkpoint (safetensors, or PyTorch's .bin), a hub id, or a folder with a PEFT adapter,
            which is attached to its base model; or the hub id of an adapter. Or the URL of a folder with safetensors,
            s3://bucket/folder, gs://, az:// or https://, of which every byte is read once, into the model.
        device_map: Where modules go, as transformers and accelerate have it: "auto", "balanced", "balanced_low_0",
            "sequential", a device, a dict of modules to devices, or None for the current device.
        dtype: Of everything that is not quantized, and on the way to int8: "auto" for the checkpoint's own, as in
            transformers 5, a torch.dtype or its name, None for float16, in which bitsandbytes computes, or a dict
            {"": one of such}, as transformers takes it: all parts of a model are loaded in one dtype.
        max_memory: Memory to use on each device, for the planned device maps.
        headroom: Use all memory of every GPU but this much (bytes, or a size such as "2GiB"), and at least what the
            load needs itself. None plans as transformers does, with 0.81 of one GPU's free memory, 0.9 of several's.
        config: What to quantize; None for LLM.int8()'s defaults. A transformers BitsAndBytesConfig(load_in_8bit=True)
            is accepted too.
        model: A transformers class (Auto classes included) instead of the one that the configuration names, or any
            torch.nn.Module but a transformers model, on meta or not, whose state dict has the checkpoint's names, to be
            filled in place.
        offload_folder: For modules that the device map puts on "disk".
        strict: Raise if a weight cannot be quantized soundly (NaN, infinity, values beyond float16), and if shards do
            not agree with their index about a tensor that the model needs. False, here or in `config`, logs one warning
            and does what bitsandbytes and transformers do.
        progress: Show a bar in bytes; None shows it on a terminal and in notebooks, unless transformers' bars are
            switched off.
        options: How to move bytes; None for the defaults and the `PYINT8_*` environment variables.
        cache: True keeps the int8 form of a 16- or 32-bit checkpoint in the user's cache, a path in that folder. It is
            made behind the first load, on a thread; the next load of the same files with the same dtype, kind of
            device, `config` and keywords for `from_pretrained` reads it instead. `PYINT8_CACHE_BYTES` bounds it.
        storage_options: For a URL: what obstore's store of that cloud takes, such as {"region": "eu-west-1"},
            {"endpoint": "https://..."}, {"skip_signature": True}, {"client_options": {...}} or {"credential_provider":
            ...}. None finds credentials as the clouds' own tools do: in their environment variables and metadata
            services.
        return_report: Return (model, LoadReport).
        process_group: Of torch.distributed: its ranks, all of which call this alike, load together. Each reads its part
            of the bytes and gets the others' from them, over NCCL for GPUs and gloo for the CPU; each has a whole
            model, on one device. Never implicit. If one fails, all others raise `pyint8.RankError`, which quotes it.
        hub_and_model_kwargs: For `from_pretrained`: revision, subfolder, token, attn_implementation and so on.

    Returns:
        The model, in evaluation mode (a module of yours: in the mode it was in), or (model, report).

    Raises:
        Pyint8Error: One of `pyint8.errors`; all say what is wrong where, and what to do. Nothing stays behind: no
            thread, no open file, no pinned memory.
    """
    with ExitStack() as stack:
        ranks = joined_ranks(stack, process_group, device_map, cache)
        stack.enter_context(called("load", hub_and_model_kwargs))
        source = decoded(path)
        is_plain = model is not None and not isinstance(model, type)
        config = int8_config(config)
        check_options(options)
        if not is_plain:
            require_transformers()
            refuse_split_models(hub_and_model_kwargs)
        check_whereabouts(storage_options, hub_and_model_kwargs, source)
        moving = options_for(source, options)
        recorder = stack.enter_context(Recorder(progress, timeline=moving.timeline))
        stack.enter_context(ending.awaited(recorder))
        with recorder.phase("read headers"):
            path = stack.enter_context(located(source, hub_and_model_kwargs, storage_options))
        check_path(path, hub_and_model_kwargs, is_plain=is_plain)
        opened = None
        if not (is_plain or is_url(source)):
            is_bounded = max_memory is not None or headroom is not None
            opened = opened_engine(stack, device_map, moving, ranks, is_bounded=is_bounded)
        base = None if is_plain else base_of_adapter(path, hub_and_model_kwargs)
        # Before anything heavy is imported: bad folders fail at once, and the disk has something to do.
        with garbage.paused(), recorder.phase("read headers"):
            checkpoint = find_checkpoint(base or path, hub_and_model_kwargs)
        cached, found = None, None
        if cache is not False:
            refuse_cache(is_plain=is_plain, is_adapter=base is not None)
            cached = cache_of(
                cache,
                Wanted(source, device_map, dtype, config, model, hub_and_model_kwargs, moving, storage_options),
                checkpoint,
                path,
            )
            found = stack.enter_context(cached.found())
            if found is not None:
                checkpoint, moving = found, options_for(found.files[0], options)  # which is here in any case
        if checkpoint is not None:
            garbage.collect_if_short(checkpoint.most_bytes_loaded)
            stack.enter_context(garbage.paused())  # not while files are downloaded
        preparation = stack.enter_context(prepare(checkpoint, moving, ranks, opened))
        _import_libraries(is_plain=is_plain)
        request = _request(
            path=path,
            base=base or path,
            device_map=device_map,
            dtype=dtype,
            max_memory=max_memory,
            headroom=headroom,
            config=config,
            offload_folder=_checked_folder(offload_folder),
            strict=strict and (config is None or config.strict),
            options=moving,
            arguments=hub_and_model_kwargs,
        )
        stack.enter_context(measured_memory(recorder.report))
        if cached is not None and found is not None:
            request = cached.request_for(found, request)
        result = _load_as(model, request, preparation, recorder)
        if cached is not None:
            cached.loaded(result, found, recorder.report)
        if path != source and not is_plain:
            name_after(source, path, result)
        warn_of_own_values(ranks, recorder.report)
    announce(recorder.report, source)
    return (result, recorder.report) if return_report else result


def _import_libraries(*, is_plain: bool) -> None:
    """Imports everything that a load needs."""
    with importing:
        if is_plain:
            import pyint8.models.plain
        else:
            import pyint8.models.transformers.loading  # noqa: F401


def _request(
    *, device_map: Any, dtype: Any, max_memory: Any, headroom: Any, options: StreamOptions, **checked: Any
) -> LoadRequest:
    """The request, with those arguments checked that need torch for it."""
    from pyint8.models.request import LoadRequest, check_dtype
    from pyint8.placement.budget import memory_budget
    from pyint8.placement.device_map import check_device_map, is_planned

    check_device_map(device_map)
    if is_planned(device_map) and processes().total > 1:
        logger.warning(
            "a planned device map under torchrun spreads a model over all visible GPUs in every rank; pass "
            'device_map="cuda" for one whole model on each rank\'s own GPU'
        )
    return LoadRequest(
        device_map=device_map,
        dtype=check_dtype(dtype),
        budget=memory_budget(max_memory, headroom, device_map, options.device_bytes),
        options=options,
        **checked,
    )


def _load_as(model: Any, request: LoadRequest, preparation: Preparation, recorder: Recorder) -> Any:
    from pyint8.models.request import check_model

    check_model(model)
    if model is None or isinstance(model, type):
        from pyint8.models.transformers.loading import load_pretrained

        return load_pretrained(model, request, preparation, recorder)
    from pyint8.models.plain import fill_module

    return fill_module(model, request, preparation, recorder)


def _checked_folder(offload_folder: Any) -> str | None:
    from pyint8.placement.offload import check_folder  # with torch

    folder = check_folder(offload_folder)
    if folder is not None:
        refuse_url("offload_folder", folder)
    return folder
