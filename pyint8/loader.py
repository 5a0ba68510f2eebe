"""The one road from a path to a model."""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.find import base_of_adapter, check_path, find_checkpoint
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import OptionError
from pyint8.host import garbage
from pyint8.host.imports import importing
from pyint8.host.memory import peak_resident_bytes
from pyint8.keywords import int8_config, refuse_misplaced
from pyint8.models.transformers.compat import require_transformers
from pyint8.models.transformers.parallel import refuse_split_models
from pyint8.report import LoadReport, Recorder, announce

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from pyint8.read_ahead import ReadAhead
    from pyint8.streaming import HeadStart

logger = logging.getLogger("pyint8")

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
    return_report: bool = False,
    **hub_and_model_kwargs: Any,
) -> Any:
    """Load a Hugging Face checkpoint as a bitsandbytes int8 model.

    The result is byte for byte what transformers gives with `load_in_8bit=True` and the same dtype and device map.

    Args:
        path: A folder with a checkpoint (safetensors, or PyTorch's .bin), a hub id, or a folder with a PEFT adapter,
            which is attached to its base model; of the hub too.
        device_map: Where modules go, as transformers and accelerate have it: "auto", "balanced", "balanced_low_0",
            "sequential", a device, a dict of modules to devices, or None for the current device.
        dtype: Of what is not quantized, and on the way to int8: "auto" for the checkpoint's own, as transformers 5 has
            it, a torch.dtype or its name, None for float16, what bitsandbytes computes in, or a dict of such for the
            parts of a model, as transformers has it: {"": ..., "vision_config": ...}.
        max_memory: Memory to use on each device, for the planned device maps.
        headroom: Plan as tightly as that: leave so much of every GPU free (bytes, or a size such as "2GiB"), at least
            what the load needs itself. None plans as transformers does, with 0.81 of one GPU's free memory, 0.9 of
            several's.
        config: What to quantize; None for LLM.int8()'s defaults. A transformers BitsAndBytesConfig(load_in_8bit=True)
            means the same and is taken too.
        model: A transformers class (Auto classes included) instead of the one that the configuration names, or any
            torch.nn.Module but a transformers model, on meta or not, whose state dict has the checkpoint's names, to be
            filled in place.
        offload_folder: For modules that the device map puts on "disk".
        strict: Raise if a weight cannot be quantized soundly (NaN, infinity, values beyond float16), and if shards do
            not agree with their index. False logs one warning and does what bitsandbytes and transformers do.
        progress: Show a bar in bytes; None shows it on a terminal and in notebooks, as transformers' switches for bars
            have it.
        options: How to move bytes; None for the defaults and the `PYINT8_*` environment variables.
        return_report: Return (model, LoadReport).
        hub_and_model_kwargs: For `from_pretrained`: revision, subfolder, token, attn_implementation and so on.

    Returns:
        The model, in evaluation mode (a module of yours: in the mode it was in), or (model, report).

    Raises:
        Pyint8Error: One of `pyint8.errors`; all say what is wrong where, and what to do. Nothing stays behind: no
            thread, no open file, no pinned memory.
    """
    refuse_misplaced(hub_and_model_kwargs)
    path = _decoded(path)
    is_plain = model is not None and not isinstance(model, type)
    config = int8_config(config)
    _check_options(options)
    if not is_plain:
        require_transformers()
        refuse_split_models(hub_and_model_kwargs)
    check_path(path, hub_and_model_kwargs, is_plain=is_plain)
    base = None if is_plain else base_of_adapter(path, hub_and_model_kwargs)
    options = StreamOptions.from_environment() if options is None else options
    with ExitStack() as begun:
        recorder = begun.enter_context(Recorder(progress))
        # Before anything heavy is imported: a folder is checked, and the disk has something to do.
        read_ahead = None
        with garbage.paused(), recorder.phase("read headers"):
            checkpoint = find_checkpoint(base or path, hub_and_model_kwargs, strict=strict)
        if checkpoint is not None:
            garbage.collect_if_short(checkpoint.most_bytes_loaded)
            begun.enter_context(garbage.paused())  # not for as long as a download takes
            read_ahead = begun.enter_context(_reading_ahead(checkpoint, options))
        arguments = _import_libraries(is_plain=is_plain)
        arguments.check_model(model)
        arguments.check_device_map(device_map)
        arguments.check_max_memory(max_memory)
        left_free = arguments.check_headroom(headroom, device_map)
        if left_free is not None:
            from pyint8.packing import budgets

            max_memory = budgets(max_memory, left_free, options.device_bytes)
        _warn_of_ranks(device_map in arguments.PLANNED_MAPS if isinstance(device_map, str) else False)
        dtype = arguments.check_dtype(dtype)
        request = _Request(
            path=path,
            base=base or path,
            checkpoint=checkpoint,
            read_ahead=read_ahead,
            device_map=device_map,
            dtype=dtype,
            max_memory=max_memory,
            tightly=left_free is not None,
            config=config,
            offload_folder=offload_folder,
            strict=strict,
            options=options,
        )
        begun.enter_context(_measured_memory(recorder.report))
        if model is None or isinstance(model, type):
            result = _load_transformers(request, model, recorder, hub_and_model_kwargs)
        else:
            result = _load_plain(request, model, recorder, hub_and_model_kwargs)
    announce(recorder.report, path)
    return (result, recorder.report) if return_report else result


def _warn_of_ranks(is_planned: bool) -> None:
    if is_planned and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logger.warning(
            "a planned device map under torchrun spreads a model over all visible GPUs in every rank; pass "
            'device_map="cuda" for one whole model on each rank\'s own GPU'
        )


def _import_libraries(*, is_plain: bool) -> ModuleType:
    """Imports all that a load needs; returns the checks of its arguments."""
    with importing:
        import pyint8.quantizer
        import pyint8.streaming
        from pyint8 import arguments

        if is_plain:
            import pyint8.models.plain
        else:
            import pyint8.models.transformers.loading  # noqa: F401
    return arguments


@dataclass(frozen=True)
class _Request:
    """The arguments that both roads share."""

    path: str
    base: str  # where the model is: the same, or what the adapter in `path` was made for
    checkpoint: Checkpoint | None  # known already, if `base` is a folder or a file
    read_ahead: ReadAhead | None
    device_map: Any
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None
    max_memory: Mapping[Any, Any] | None
    tightly: bool  # whether `max_memory` is what may be used, all of it
    config: Int8Config | None
    offload_folder: str | os.PathLike[str] | None
    strict: bool
    options: StreamOptions


def _reading_ahead(checkpoint: Checkpoint, options: StreamOptions) -> closing[ReadAhead]:
    from pyint8.read_ahead import ReadAhead  # the extension: `import pyint8` does without

    return closing(ReadAhead(checkpoint, options))


def _load_transformers(request: _Request, model_class: type | None, recorder: Recorder, kwargs: dict[str, Any]) -> Any:
    from pyint8.streaming import begin

    with ExitStack() as begun:
        head_start = None
        if request.checkpoint is not None:
            head_start = begin(request.checkpoint, request.device_map, request.max_memory, request.options)
        if head_start is not None:
            begun.enter_context(closing(head_start))
        return _load_session(request, model_class, recorder, kwargs, head_start)


def _load_session(
    request: _Request,
    model_class: type | None,
    recorder: Recorder,
    kwargs: dict[str, Any],
    head_start: HeadStart | None,
) -> Any:
    from pyint8.models.transformers.loading import load_pretrained
    from pyint8.models.transformers.session import LoadSession
    from pyint8.quantizer import Int8Quantizer

    int8 = Int8Quantizer(request.config or Int8Config())
    int8.validate_environment(from_tf=kwargs.pop("from_tf", False), from_flax=kwargs.pop("from_flax", False))
    session = LoadSession(
        request.options,
        strict=request.strict,
        checkpoint=request.checkpoint,
        read_ahead=request.read_ahead,
        head_start=head_start,
        budgets=request.max_memory if request.tightly else None,
        recorder=recorder,
        allow_mismatched_shapes=kwargs.get("ignore_mismatched_sizes", False),
    )
    placement = {
        "device_map": request.device_map,
        "dtype": int8.update_dtype(request.dtype),
        "max_memory": None if request.max_memory is None else dict(request.max_memory),  # accelerate writes into it
        "offload_folder": request.offload_folder,
    }
    return load_pretrained(
        request.path,
        session,
        base=request.base,
        model_class=model_class,
        int8_config=request.config,
        placement=placement,
        arguments=kwargs,
    )


def _load_plain(request: _Request, module: nn.Module, recorder: Recorder, kwargs: dict[str, Any]) -> nn.Module:
    if kwargs:
        raise OptionError(f"these arguments mean nothing for a module of your own: {', '.join(sorted(kwargs))}")
    if isinstance(request.dtype, Mapping):
        raise OptionError("dtype is a dict, which is for the parts of a transformers model; give one torch.dtype")
    assert request.checkpoint is not None

    from pyint8.models.plain import fill_module

    return fill_module(
        module,
        request.checkpoint,
        device_map=request.device_map,
        dtype=request.dtype,
        max_memory=request.max_memory,
        tightly=request.tightly,
        config=request.config or Int8Config(),
        offload_folder=request.offload_folder,
        strict=request.strict,
        options=request.options,
        recorder=recorder,
    )


def _decoded(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise OptionError(f"path is {path!r}; it must be a folder or a hub id") from None


def _check_options(options: object) -> None:
    if options is not None and not isinstance(options, StreamOptions):
        raise OptionError(f"options is {reprlib.repr(options)}; it must be a pyint8.StreamOptions or None")


@contextmanager
def _measured_memory(report: LoadReport) -> Iterator[None]:
    """Fills the report's peaks."""
    import torch

    before = peak_resident_bytes()
    if torch.cuda.is_initialized():  # in a process that did not use a device yet, its peak is zero anyway
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    yield
    report.host_peak_bytes = peak_resident_bytes() - before
    if torch.cuda.is_initialized():
        peaks = {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
        report.device_peak_bytes = {name: peak for name, peak in peaks.items() if peak}
