"""From a 16- or 32-bit checkpoint to its int8 form: `pyint8.convert`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from pyint8.checkpoint.find import base_of_adapter, check_path
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import OptionError
from pyint8.host.files import exists, is_folder
from pyint8.host.imports import importing
from pyint8.models.keywords import called, int8_config
from pyint8.models.origin import origin
from pyint8.models.transformers.parallel import refuse_split_models
from pyint8.models.transformers.releases import require_transformers
from pyint8.operations.common import (
    begun,
    check_options,
    check_whereabouts,
    decoded,
    decoded_folder,
    device_of_rank,
    devices_of,
    located,
    measured_memory,
    options_for,
    ranks_apart,
)
from pyint8.operations.conversions import conversion_request, plan_conversion, write_converted
from pyint8.operations.save import describe
from pyint8.report import LoadReport, Recorder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch.distributed import ProcessGroup

    from pyint8.streaming.preparation import Preparation
    from pyint8.streaming.ranks.ranks import Ranks


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    config: Int8Config | None = None,
    max_shard_size: int | str = "5GB",
    checksums: bool = False,
    fused_experts: bool = False,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
    **hub_and_model_kwargs: Any,
) -> LoadReport:
    """Convert a checkpoint to bitsandbytes' int8 form, without ever holding the model.

    The files are those that `pyint8.load` and then `pyint8.save` would write, to the byte. A few tensors at a time are
    read, quantized and written: a GPU needs 1.5 GB and room for the largest tensor, host memory a few hundred megabytes
    and room for the largest tensor.

    A conversion that was killed or interrupted, or that could not read a file, is continued by the next call with the
    same arguments, strictness and comparing of checksums included. `folder` is as it was until all is done.

    Args:
        source: A folder, hub id or URL (see `pyint8.load`) with the checkpoint of a transformers model.
        folder: Where to; made if it is not there. Its other files stay.
        device: Where weights are quantized, whose bits depend on the kind of device: "cpu", "cuda", "cuda:1"; None for
            all visible GPUs, or the CPU where there is none.
        dtype: As in `pyint8.load`.
        config: What to quantize.
        max_shard_size: Of one file, in bytes or as a size such as "5GB"; a tensor that is larger has its own.
        checksums: Also write the CRC-32C of each tensor, as in `pyint8.save`.
        fused_experts: Write the int8 experts of a module as one tensor, as in `pyint8.save`.
        progress: Whether to show a bar; None shows one on a terminal.
        options: How to move bytes.
        storage_options: For a URL, as in `pyint8.load`.
        process_group: Of torch.distributed: its ranks, all of which call this alike, share the files out, each on one
            device (None: the GPU of its LOCAL_RANK, or the CPU), into a folder that all of them see. When it returns,
            all is done; if one fails, all raise. The files are those of one process, and each goes on where the other
            stopped.
        hub_and_model_kwargs: For `from_pretrained`: revision, subfolder, token, trust_remote_code and so on.

    Returns:
        What was done, by this rank; `checkpoint_bytes` counts what was read this time.

    Raises:
        RankError: Another rank failed.
        Pyint8Error: Another of `pyint8.errors`.
    """
    asked = _Asked(device, dtype, config, max_shard_size, checksums, fused_experts, hub_and_model_kwargs)
    with ExitStack() as stack:
        ranks = ranks_apart(stack, process_group)
        stack.enter_context(called("convert", hub_and_model_kwargs))
        name, target = decoded(source), decoded_folder(folder)
        _refuse(name, target, int8_config(config), hub_and_model_kwargs)
        check_options(options)
        check_whereabouts(storage_options, hub_and_model_kwargs, name)
        require_transformers()
        refuse_split_models(hub_and_model_kwargs)
        options = options_for(name, options)
        path = stack.enter_context(located(name, hub_and_model_kwargs, storage_options))
        _check_path(path, hub_and_model_kwargs)
        begin = begun(path, hub_and_model_kwargs, options, progress=progress)
        preparation, recorder = stack.enter_context(begin)
        with importing:
            import pyint8.models.transformers.loading  # noqa: F401
        with measured_memory(recorder.report):
            _convert(asked, path, target, options, preparation, recorder, ranks)
    return recorder.report


def _check_path(path: str, arguments: Mapping[str, Any]) -> None:
    check_path(path, arguments, is_plain=False)
    base = base_of_adapter(path, arguments)
    if base is not None:
        raise OptionError(f"{path} is an adapter; convert the model that it is for, {base}")


class _Asked(NamedTuple):
    """The arguments of `convert` that say what is written."""

    device: Any
    dtype: Any
    config: Int8Config | None
    max_shard_size: int | str
    checksums: bool
    fused_experts: bool
    arguments: Mapping[str, Any]


def _convert(
    asked: _Asked,
    path: str,
    target: str,
    options: StreamOptions,
    preparation: Preparation,
    recorder: Recorder,
    ranks: Ranks | None,
) -> None:
    def complete(staging: str) -> None:
        describe(plan.model, staging, has_card=exists(os.path.join(target, "README.md")))

    devices = devices_of(asked.device) if ranks is None else [device_of_rank(asked.device)]
    request = conversion_request(
        path, devices[0], asked.dtype, int8_config(asked.config), options, dict(asked.arguments)
    )
    fused = asked.fused_experts
    plan = plan_conversion(None, request, asked.max_shard_size, preparation, recorder, fused_experts=fused)
    if fused:
        _require_experts(plan.model)
    plan = plan._replace(checksums=asked.checksums)
    if origin(plan.model, plan.load.checkpoint.files).lost_in(target):
        raise _is_the_source(path)
    if ranks is None:
        write_converted(plan, target, devices, preparation, recorder, complete)
        return
    from pyint8.operations.convert_together import write_together

    preparation.stop_prefetch()  # which reads everything
    write_together(plan, target, devices[0], preparation, recorder, complete, ranks)


def _require_experts(model: Any) -> None:
    from pyint8.models.transformers.saving import require_experts

    require_experts(model)


def _refuse(path: str, target: str, config: Int8Config | None, arguments: Mapping[str, Any]) -> None:
    inside = os.path.join(path, arguments.get("subfolder") or "")
    if is_folder(inside) and os.path.realpath(inside) == os.path.realpath(target):
        raise _is_the_source(inside)
    if config is not None and config.has_fp16_weight:
        raise OptionError("config has has_fp16_weight, which keeps weights in 16 bit: there is nothing to convert")
    if arguments.get("ignore_mismatched_sizes"):
        raise OptionError("ignore_mismatched_sizes makes up weights that the checkpoint does not have; load, then save")


def _is_the_source(path: str) -> OptionError:
    return OptionError(f"folder is the source itself, {path}, whose files would be lost; give another folder")
