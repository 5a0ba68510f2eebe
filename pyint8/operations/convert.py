"""From a 16- or 32-bit checkpoint to its int8 form: `pyint8.convert`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from pyint8.checkpoint.find import base_of_adapter, check_path
from pyint8.checkpoint.identity import digest, identity_of
from pyint8.checkpoint.journal import Journal
from pyint8.checkpoint.replacement import emptied_unless, replaced_folder
from pyint8.checkpoint.side_files import is_of_a_save
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import CancelledError, OptionError, ReadError
from pyint8.host.files import exists, is_folder
from pyint8.host.imports import importing
from pyint8.models.keywords import int8_config, refuse_misplaced
from pyint8.models.transformers.parallel import refuse_split_models
from pyint8.models.transformers.releases import require_transformers
from pyint8.operations.common import (
    begun,
    check_options,
    check_storage_options,
    decoded,
    decoded_folder,
    devices_of,
    located,
    measured_memory,
    options_for,
)
from pyint8.operations.save import describe
from pyint8.remote.objects import tag_of
from pyint8.report import LoadReport, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from pyint8.models.converted_files import ConvertedFiles
    from pyint8.models.request import LoadRequest
    from pyint8.models.transformers.converting import Conversion
    from pyint8.models.transformers.planned import PlannedLoad
    from pyint8.streaming.preparation import Preparation

_JOURNAL = ".pyint8-journal"


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto",
    config: Int8Config | None = None,
    max_shard_size: int | str = "5GB",
    checksums: bool = False,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **hub_and_model_kwargs: Any,
) -> LoadReport:
    """Convert a checkpoint to bitsandbytes' int8 form, without ever holding the model.

    The files are those that `pyint8.load` and then `pyint8.save` would write, to the byte. A few tensors at a time are
    read, quantized and written: a GPU needs 1.5 GB and room for the largest tensor, host memory a few hundred megabytes
    and room for the largest tensor.

    A conversion that was killed or interrupted, or that could not read a file, is continued by the next call with the
    same arguments. `folder` is as it was until all is done.

    Args:
        source: A folder, hub id or URL (see `pyint8.load`) with the checkpoint of a transformers model.
        folder: Where to; made if it is not there. Its other files stay.
        device: Where weights are quantized, whose bits depend on the kind of device: "cpu", "cuda", "cuda:1"; None for
            all visible GPUs, or the CPU where there is none.
        dtype: As in `pyint8.load`.
        config: What to quantize.
        max_shard_size: Of one file, in bytes or as a size such as "5GB"; a tensor that is larger has its own.
        checksums: Also write the CRC-32C of each tensor, as in `pyint8.save`.
        progress: Whether to show a bar; None shows one on a terminal.
        options: How to move bytes.
        storage_options: For a URL, as in `pyint8.load`.
        hub_and_model_kwargs: For `from_pretrained`: revision, subfolder, token, trust_remote_code and so on.

    Returns:
        What was done; `checkpoint_bytes` counts what was read this time.

    Raises:
        Pyint8Error: One of `pyint8.errors`.
    """
    refuse_misplaced(hub_and_model_kwargs)
    name, target = decoded(source), decoded_folder(folder)
    config = int8_config(config)
    _refuse(name, target, config, hub_and_model_kwargs)
    check_options(options)
    check_storage_options(storage_options, name)
    require_transformers()
    refuse_split_models(hub_and_model_kwargs)
    options = options_for(name, options)
    with ExitStack() as stack:
        path = stack.enter_context(located(name, hub_and_model_kwargs, storage_options))
        _check_path(path, hub_and_model_kwargs)
        begin = begun(path, hub_and_model_kwargs, options, progress=progress)
        preparation, recorder = stack.enter_context(begin)
        with importing:
            import pyint8.models.transformers.loading  # noqa: F401
        devices = devices_of(device)
        with measured_memory(recorder.report):
            request = conversion_request(path, devices[0], dtype, config, options, hub_and_model_kwargs)
            plan = plan_conversion(None, request, max_shard_size, preparation, recorder)
            _convert(plan._replace(checksums=checksums), target, devices, preparation, recorder)
    return recorder.report


def _check_path(path: str, arguments: Mapping[str, Any]) -> None:
    check_path(path, arguments, is_plain=False)
    base = base_of_adapter(path, arguments)
    if base is not None:
        raise OptionError(f"{path} is an adapter; convert the model that it is for, {base}")


def _convert(
    plan: ConversionPlan, target: str, devices: Sequence[torch.device], preparation: Preparation, recorder: Recorder
) -> None:
    def complete(staging: str) -> None:
        describe(plan.model, staging, has_card=exists(os.path.join(target, "README.md")))

    write_converted(plan, target, devices, preparation, recorder, complete)


class ConversionPlan(NamedTuple):
    """A conversion that can begin."""

    request: LoadRequest
    model: Any
    load: PlannedLoad
    conversion: Conversion
    checksums: bool = False


def plan_conversion(
    model_class: Any, request: LoadRequest, max_shard_size: int | str, preparation: Preparation, recorder: Recorder
) -> ConversionPlan:
    """Everything about a conversion, before a tensor is read.

    Args:
        model_class: A transformers class, or None for the one that the configuration names.
        request: What is converted, to the device that its map names.
        max_shard_size: Of one file.
        preparation: What has begun already.
        recorder: Told of phases.

    Raises:
        Pyint8Error: It cannot be converted.
    """
    from pyint8.models.transformers.converting import Conversion
    from pyint8.models.transformers.loading import plan_pretrained

    model, load = plan_pretrained(request, preparation, recorder, model_class=model_class)
    return ConversionPlan(request, model, load, Conversion(model, load, max_shard_size))


def write_converted(
    plan: ConversionPlan,
    target: str,
    devices: Sequence[torch.device],
    preparation: Preparation,
    recorder: Recorder,
    complete: Callable[[str], None],
) -> None:
    """Writes weights and configurations to a folder, which is as it was until all is there.

    Args:
        plan: What to write.
        target: The folder.
        devices: Where weights are quantized.
        preparation: What has begun already.
        recorder: Told of bytes and phases.
        complete: Adds to the finished folder whatever else belongs there.

    Raises:
        Pyint8Error: A tensor cannot be read, quantized or written.
    """
    from pyint8.models.transformers.saving import write_description

    identity, checkpoint = _identity(plan, devices[0]), plan.load.checkpoint
    with replaced_folder(target, is_of_a_save, is_resumed=_is_resumed) as staging, recorder.phase("stream"):
        file = os.path.join(staging, _JOURNAL)
        emptied_unless(staging, Journal.is_of(file, identity))
        with (
            Journal(file, identity) as journal,
            _files(plan, staging, journal) as files,
        ):
            plan.conversion.run(files, journal.done, devices, preparation, recorder)
            files.finish()
        checkpoint.require_unchanged(checkpoint.files)
        write_description(plan.model, staging)
        complete(staging)
        os.unlink(file)


def _files(plan: ConversionPlan, staging: str, journal: Journal) -> ConvertedFiles:
    from pyint8.models.converted_files import ConvertedFiles

    made = plan.conversion
    return ConvertedFiles(staging, made.shards, journal, made.num_parameters, checksums=plan.checksums)


def _refuse(path: str, target: str, config: Int8Config | None, arguments: Mapping[str, Any]) -> None:
    if is_folder(path) and os.path.realpath(path) == os.path.realpath(target):
        raise OptionError(f"folder is the source itself, {path}, whose files would be lost; give another folder")
    if config is not None and config.has_fp16_weight:
        raise OptionError("config has has_fp16_weight, which keeps weights in 16 bit: there is nothing to convert")
    if arguments.get("ignore_mismatched_sizes"):
        raise OptionError("ignore_mismatched_sizes makes up weights that the checkpoint does not have; load, then save")


def conversion_request(
    path: str,
    device: torch.device,
    dtype: Any,
    config: Int8Config | None,
    options: StreamOptions,
    arguments: Mapping[str, Any],
) -> LoadRequest:
    """What `plan_conversion` takes.

    Args:
        path: A folder or hub id.
        device: Where the first weight is quantized.
        dtype: As in `pyint8.load`.
        config: What to quantize.
        options: How to move bytes.
        arguments: For `from_pretrained`.

    Raises:
        OptionError: `dtype` is none.
    """
    from pyint8.models.request import LoadRequest, check_dtype

    return LoadRequest(
        path=path,
        base=path,
        device_map={"": device},
        dtype=check_dtype(dtype),
        config=config,
        strict=config is None or config.strict,
        options=options,
        arguments=arguments,
    )


def _identity(plan: ConversionPlan, device: torch.device) -> str:
    """Of the work: what makes its result another."""
    from importlib.metadata import version

    versions = [version(name) for name in ("pyint8", "bitsandbytes", "torch", "transformers")]
    files = {name: [str(tensor) for tensor in tensors] for name, tensors in plan.conversion.shards.files.items()}
    source = identity_of(plan.load.checkpoint, tag_of)
    return digest([source, files, device.type, plan.request.dtype, plan.checksums, versions])


def _is_resumed(error: BaseException) -> bool:
    """Whether what was written is of use after an error: of an interruption, or of storage that may be there again."""
    return not isinstance(error, Exception) or isinstance(error, (ReadError, CancelledError))
