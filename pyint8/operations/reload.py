"""New weights into the memory that a model has: `pyint8.reload`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint.find import base_of_adapter, check_path
from pyint8.config import StreamOptions
from pyint8.errors import OptionError
from pyint8.host import garbage
from pyint8.host.imports import importing
from pyint8.models.keywords import FINDING, called, refuse_others
from pyint8.models.transformers.releases import require_transformers
from pyint8.operations.common import (
    begun,
    check_options,
    check_whereabouts,
    decoded,
    is_of_transformers,
    located,
    measured_memory,
    opened_engine_for,
    options_for,
)
from pyint8.report import LoadReport, Recorder

if TYPE_CHECKING:
    from torch import nn

    from pyint8.models.request import LoadRequest
    from pyint8.streaming.preparation import Preparation

_OF_THE_MODEL = (
    *("config", "device", "device_map", "dtype", "headroom", "max_memory", "model", "offload_folder"),
    *("quantization_config", "return_report", "torch_dtype"),
)
_ABSENT = object()
_UNFIT = "ignore_mismatched_sizes"
_READ = (*FINDING, "key_mapping", _UNFIT)


def reload(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **hub_kwargs: Any,
) -> LoadReport:
    """Replace the weights of an int8 model by those of another checkpoint of its architecture, in place.

    For reinforcement learning and fine-tuning, where a trainer writes new weights for a model that generates. The bytes
    are those that `pyint8.load` would give with the model's dtype and devices, in the memory that the model has: what
    was compiled, hooked, dispatched or tied stays so, and forward passes may have been run. Values that are not
    quantized get the dtype that the model has there. Adapters of PEFT stay as they are; the model under them is
    reloaded. A few tensors at a time are made, checked and copied, with no second copy of the model: that takes half a
    gigabyte of each GPU (or of host memory, for what is there), and room for the largest tensor.

    Call it between forward passes: while it runs, the model has weights of both checkpoints.

    Args:
        model: Any model with int8 modules that is loaded: pyint8's or transformers' own, a module of yours that
            `pyint8.load` has filled, or one of these in the wrappers of PEFT, torch.compile or DistributedDataParallel.
        path: A folder, hub id or URL (see `pyint8.load`) with a checkpoint in 16 or 32 bit, or an int8 one; for a
            module of yours a file, too.
        strict: Raise if a weight cannot be quantized soundly (see `pyint8.load`), before it is written, and if the
            checkpoint lacks something that the model has. False logs one warning and goes on.
        progress: Whether to show a bar; None shows one on a terminal.
        options: How to move bytes.
        storage_options: For a URL, as in `pyint8.load`.
        hub_kwargs: Where a checkpoint is found (revision, subfolder, variant, token and so on), `key_mapping`, and what
            the model's configuration has, such as num_labels, with the value that it has there.

    Returns:
        What was done.

    Raises:
        PartlyReplacedError: It stopped after the first write. It names what was replaced; its cause is the error.
        Pyint8Error: Another of `pyint8.errors`; the model is as it was. All that can be known without reading tensors
            (names, shapes, dtypes, what is int8 on both sides) is checked before the first is written.
    """
    source = decoded(path)
    inside = _checked(model, hub_kwargs)
    is_plain = not is_of_transformers(inside)
    check_options(options)
    check_whereabouts(storage_options, hub_kwargs, source)
    options = options_for(source, options)
    with ExitStack() as stack:
        stack.enter_context(called("reload", hub_kwargs))
        _refuse_changes(inside, hub_kwargs, is_plain=is_plain)
        path = stack.enter_context(located(source, hub_kwargs, storage_options))
        _check_path(path, hub_kwargs, is_plain=is_plain)
        opened = None
        if not is_plain:
            opened = opened_engine_for(stack, (parameter.device for parameter in inside.parameters()), options)
        begin = begun(path, hub_kwargs, options, progress=progress, opened=opened)
        preparation, recorder = stack.enter_context(begin)
        stack.enter_context(garbage.paused())
        stack.enter_context(measured_memory(recorder.report))
        request = _request(path, strict, options, hub_kwargs)
        _reload(inside, request, preparation, recorder, is_plain=is_plain)
    return recorder.report


def _reload(model: Any, request: LoadRequest, preparation: Preparation, recorder: Recorder, *, is_plain: bool) -> None:
    if is_plain:
        with importing:
            from pyint8.models.reloading import reload_module
        reload_module(model, request, preparation, recorder)
    else:
        with importing:
            from pyint8.models.transformers.reloading import reload_pretrained
        reload_pretrained(model, request, preparation, recorder)


def _checked(model: Any, arguments: dict[str, Any]) -> Any:
    """The model without wrappers."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {model!r:.80}; it must be an int8 model that is loaded")
    for name in _OF_THE_MODEL:
        if name in arguments:
            raise OptionError(
                f"{name} is not an argument of pyint8.reload: the model stays as it is but for its values"
            )
    with importing:
        from pyint8.models.live import require_int8, without_adapters
    inside = without_adapters(model)
    require_int8(inside)
    return inside


def _refuse_changes(model: Any, arguments: dict[str, Any], *, is_plain: bool) -> None:
    """Refuses what would change the model: its configuration stays; what it says already is taken."""
    if arguments.get(_UNFIT):
        raise OptionError(f"{_UNFIT} makes up weights that the checkpoint does not have; load, instead of reloading")
    for name in () if is_plain else sorted(arguments.keys() - {*_READ}):
        own = getattr(model.config, "_attn_implementation" if name == "attn_implementation" else name, _ABSENT)
        if own is _ABSENT:
            refuse_others("reload", [name], _READ, "neither the files nor the model's configuration have such a thing")
        if own != arguments[name]:
            raise OptionError(
                f"{name} is {arguments[name]!r:.80}, and {own!r:.80} in the model's configuration, which pyint8.reload "
                "does not change: the model stays as it is but for its values"
            )


def _check_path(path: str, arguments: dict[str, Any], *, is_plain: bool) -> None:
    if not is_plain:
        require_transformers()
    elif arguments:
        raise OptionError(f"these arguments mean nothing for a module of your own: {', '.join(sorted(arguments))}")
    check_path(path, arguments, is_plain=is_plain)
    if base_of_adapter(path, arguments) is not None:
        raise OptionError(f"{path} is an adapter; reload the model that it is for, or use model.load_adapter of PEFT")


def _request(path: str, strict: bool, options: StreamOptions, arguments: dict[str, Any]) -> LoadRequest:
    from pyint8.models.request import LoadRequest

    return LoadRequest(path=path, base=path, strict=strict, options=options, arguments=arguments)
