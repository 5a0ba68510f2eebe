"""The one road from a path to a model."""

from __future__ import annotations

import os
import reprlib
import resource
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyint8 import collector
from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.find import base_of_adapter, check_path, find_checkpoint
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import OptionError
from pyint8.progress import ByteProgress
from pyint8.report import LoadReport

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pyint8.read_ahead import ReadAhead
    from pyint8.streaming import HeadStart

# Said in `config`, or by the return value.
_REPLACED_ARGUMENTS = {
    "load_in_8bit": "pyint8.load always loads in 8 bit",
    "load_in_4bit": "pyint8.load loads in 8 bit",
    "quantization_config": "say what to quantize with config=pyint8.Int8Config(...)",
    "output_loading_info": "pass return_report=True; the report has loading_info",
    "state_dict": "pyint8.load reads files; use transformers for tensors you have",
    "gguf_file": "GGUF checkpoints are not read; convert to safetensors",
    "torch_dtype": "it is named dtype",
    "disable_mmap": "pyint8 maps no files",
}


def load(
    path: str | os.PathLike[str],
    device_map: Any = "auto",
    *,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
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
        dtype: Of what is not quantized, and on the way to int8: a torch.dtype or its name, "auto" for the
            checkpoint's own, None for float16 (transformers 5 would take "auto"), or a dict of such for the parts of a
            model, as transformers has it: {"": ..., "vision_config": ...}.
        max_memory: Memory to use on each device, for the planned device maps.
        headroom: Plan as tightly as that: leave so much of every GPU free (bytes, or a size such as "2GiB"), at least
            what the load needs itself. None plans as transformers does, with 0.81 of one GPU's free memory, 0.9 of
            several's.
        config: What to quantize; None for LLM.int8()'s defaults.
        model: A transformers class (Auto classes included) instead of the one that the configuration names, or any
            torch.nn.Module but a transformers model, on meta or not, whose state dict has the checkpoint's names, to be
            filled in place.
        offload_folder: For modules that the device map puts on "disk".
        strict: Raise if a weight cannot be quantized soundly (NaN, infinity, values beyond float16), and if shards do
            not agree with their index about a tensor that the model wants. False, here or in `config`, logs one warning
            and does what bitsandbytes and transformers do.
        progress: Show a bar in bytes; None shows it on a terminal.
        options: How to move bytes; None for the defaults and the `PYINT8_*` environment variables.
        return_report: Return (model, LoadReport).
        hub_and_model_kwargs: For `from_pretrained`: revision, subfolder, token, attn_implementation and so on.

    Returns:
        The model, in evaluation mode (a module of yours: in the mode it was in), or (model, report).

    Raises:
        Pyint8Error: One of `pyint8.errors`; all say what is wrong where, and what to do. Nothing stays behind: no
            thread, no open file, no pinned memory.
    """
    for name, instead in _REPLACED_ARGUMENTS.items():
        if name in hub_and_model_kwargs:
            raise OptionError(f"{name} is not an argument of pyint8.load: {instead}")
    path = _decoded(path)
    is_plain = model is not None and not isinstance(model, type)
    check_path(path, is_plain=is_plain)
    _check_types(config=(config, Int8Config), options=(options, StreamOptions))
    base = None if is_plain else base_of_adapter(path, hub_and_model_kwargs)
    options = StreamOptions.from_environment() if options is None else options
    report = LoadReport()
    with ExitStack() as begun:
        # Before anything heavy is imported: a folder is checked, and the disk has something to do.
        read_ahead = None
        with collector.held_off(), report.phase("read headers"):
            checkpoint = find_checkpoint(base or path, hub_and_model_kwargs)
        if checkpoint is not None:
            collector.make_room(checkpoint.most_bytes_loaded)
            begun.enter_context(collector.held_off())  # not for as long as a download takes
            read_ahead = begun.enter_context(_reading_ahead(checkpoint, options))

        from pyint8 import arguments

        arguments.check_model(model)
        arguments.check_device_map(device_map)
        arguments.check_max_memory(max_memory)
        left_free = arguments.check_headroom(headroom, device_map)
        if left_free is not None:
            from pyint8.packing import budgets

            max_memory = budgets(max_memory, left_free, options.device_bytes)
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
            strict=strict and (config is None or config.strict),
            options=options,
        )
        begun.enter_context(_measured_memory(report))
        bar = begun.enter_context(ByteProgress(progress))
        if model is None or isinstance(model, type):
            result = _load_transformers(request, model, report, bar, hub_and_model_kwargs)
        else:
            result = _load_plain(request, model, report, bar, hub_and_model_kwargs)
    return (result, report) if return_report else result


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


def _load_transformers(
    request: _Request, model_class: type | None, report: LoadReport, bar: ByteProgress, kwargs: dict[str, Any]
) -> Any:
    from pyint8.streaming import begin

    with ExitStack() as begun:
        head_start = None
        if request.checkpoint is not None:
            head_start = begin(request.checkpoint, request.device_map, request.max_memory, request.options)
        if head_start is not None:
            begun.enter_context(closing(head_start))
        return _load_session(request, model_class, report, bar, kwargs, head_start)


def _load_session(
    request: _Request,
    model_class: type | None,
    report: LoadReport,
    bar: ByteProgress,
    kwargs: dict[str, Any],
    head_start: HeadStart | None,
) -> Any:
    from pyint8.models.transformers import LoadSession, load_pretrained
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
        report=report,
        on_bytes=bar.advance,
        on_total=bar.start,
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


def _load_plain(
    request: _Request, module: nn.Module, report: LoadReport, bar: ByteProgress, kwargs: dict[str, Any]
) -> nn.Module:
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
        report=report,
        on_bytes=bar.advance,
        on_total=bar.start,
    )


def _decoded(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise OptionError(f"path is {path!r}; it must be a folder or a hub id") from None


def _check_types(**arguments: tuple[object, type]) -> None:
    for name, (value, kind) in arguments.items():
        if value is not None and not isinstance(value, kind):
            raise OptionError(f"{name} is {reprlib.repr(value)}; it must be a pyint8.{kind.__name__} or None")


@contextmanager
def _measured_memory(report: LoadReport) -> Iterator[None]:
    """Fills the report's peaks."""
    import torch

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_initialized():  # in a process that did not use a device yet, its peak is zero anyway
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    yield
    report.host_peak_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if torch.cuda.is_initialized():
        peaks = {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
        report.device_peak_bytes = {name: peak for name, peak in peaks.items() if peak}
