"""From a path to a transformers model: its class, and from_pretrained with our quantizer in it."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.find import CODE_ARGUMENTS, HUB_ARGUMENTS, cached_file, named_by_adapter
from pyint8.config import METHOD, Int8Config
from pyint8.errors import CheckpointError, CheckpointNotFoundError, ModelNotSupportedError, OptionError, ReadError
from pyint8.host import garbage
from pyint8.host.files import exists, is_folder
from pyint8.models.request import LoadRequest
from pyint8.models.transformers import hooks  # noqa: F401  registers pyint8's quantizer with transformers
from pyint8.models.transformers.expert_codes import refuse_other_forms
from pyint8.models.transformers.failures import (
    ASKS_FOR_TRUST,
    named_configuration,
    named_failures,
    named_problems,
    untrusted,
)
from pyint8.models.transformers.left_as_found import left_as_found
from pyint8.models.transformers.likely_dtypes import likely_dtypes
from pyint8.models.transformers.planned import PlannedLoad
from pyint8.models.transformers.session import LoadSession, PlanningSession
from pyint8.quantizer import Int8Quantizer, find_entry_point
from pyint8.report import Recorder
from pyint8.streaming.guesses import Guess
from pyint8.streaming.preparation import Preparation

# from_pretrained changes the process while it runs (the default dtype, PreTrainedModel's methods, progress bars): two
# at once leave weights on meta, without an error. It also imports configurations and models when they are first named.
_load_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: the thread that has the lock is not there."""
    global _load_lock
    _load_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)

# For finding a checkpoint and its code; the other arguments may be for the configuration or the model.
_FINDING_ARGUMENTS = frozenset({*HUB_ARGUMENTS, *CODE_ARGUMENTS})


def load_pretrained(
    model_class: Any, request: LoadRequest, preparation: Preparation, recorder: Recorder
) -> transformers.PreTrainedModel:
    """Loads with transformers' own from_pretrained, and pyint8's quantizer in it.

    Args:
        model_class: A transformers class (Auto classes included), or None for the one that the configuration names.
        request: What was asked for.
        preparation: What the load has started already.
        recorder: Its report gets everything, `loading_info` included.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelNotSupportedError: transformers does not know the configuration, or it is quantized by another method.
    """
    int8 = Int8Quantizer(request.config or Int8Config())
    int8.validate_environment(**{name: request.arguments.get(name, False) for name in ("from_tf", "from_flax")})
    dtype = int8.update_dtype(request.dtype)
    guess = _guess_of(int8.config, dtype, request, preparation.checkpoint)
    preparation.start_head_start(request.device_map, request.budget, guess)
    memory = request.budget.per_device
    placement = {
        "device_map": request.device_map,
        "dtype": dtype,
        "max_memory": None if memory is None else dict(memory),  # accelerate writes into it
        "offload_folder": request.offload_folder,
    }
    return _from_pretrained(model_class, LoadSession(request, preparation, recorder), placement)


def _guess_of(config: Int8Config, dtype: Any, request: LoadRequest, checkpoint: Checkpoint | None) -> Guess | None:
    """What weights will become; None where code may be used that is not transformers' own, and has them otherwise."""
    if request.arguments.get("trust_remote_code"):
        is_here = is_folder(request.base)
        if not is_here or any(name.endswith(".py") for name in os.listdir(request.base)):
            return None
    dtypes = likely_dtypes(dtype, checkpoint, request)
    is_16_bit = bool(dtypes) and all(each.itemsize == 2 for each in dtypes)
    return Guess(config.experts, dtypes[0] if dtypes else None, find_entry_point(), is_16_bit)


def plan_pretrained(
    request: LoadRequest,
    preparation: Preparation,
    recorder: Recorder,
    *,
    model_class: Any = None,
    place: Callable[[Any, Any], object] | None = None,
) -> tuple[Any, PlannedLoad]:
    """As `load_pretrained`, without reading tensors: those of the checkpoint stand in the model on meta.

    Args:
        request: What was asked for.
        preparation: What has begun already.
        recorder: Its report gets everything.
        place: Called with the model and transformers' quantizer when a device map would be planned.

    Returns:
        The model, and its load, which has not started.

    Raises:
        ModelNotSupportedError: transformers does not know the configuration, or it is quantized by another method.
    """
    int8 = Int8Quantizer(request.config or Int8Config())
    int8.validate_environment()
    session = PlanningSession(request, preparation, recorder)
    session.place = place
    placement = {"device_map": request.device_map, "dtype": int8.update_dtype(request.dtype)}
    model = _from_pretrained(model_class, session, placement)
    if session.planned is None:
        raise ModelNotSupportedError(f"transformers loads {request.path} without reading its checkpoint")
    return model, session.planned


def is_int8_already(model_class: Any, request: LoadRequest) -> bool:
    """Whether the configuration beside a checkpoint says that it is quantized."""
    hub = {name: value for name, value in request.arguments.items() if name in _FINDING_ARGUMENTS}
    return _stored_quantization(_read_config(model_class.config_class, request.base, hub)) is not None


def _from_pretrained(model_class: Any, session: LoadSession, placement: dict[str, Any]) -> transformers.PreTrainedModel:
    stack = ExitStack()

    def load() -> Any:
        try:
            return _made_by_transformers(model_class, session, placement, stack)
        finally:  # again: Ctrl-C may have come while it was closed
            stack.close()

    with _load_lock:
        return left_as_found(load)


def _made_by_transformers(
    model_class: Any, session: LoadSession, placement: dict[str, Any], stack: ExitStack
) -> transformers.PreTrainedModel:
    request, recorder = session.request, session.recorder
    with stack:
        stack.enter_context(named_failures(request))
        with named_configuration(request):
            model_class, arguments, config = _resolve(model_class, request)
        stack.enter_context(session.activate())
        stack.enter_context(recorder.phase("build"))
        session.on_files = lambda: stack.enter_context(garbage.paused())  # downloads are complete
        session.on_start = lambda: stack.enter_context(_without_progress_bar())  # ours is shown
        stack.enter_context(named_problems(request, model_class, arguments))
        model, recorder.report.loading_info = model_class.from_pretrained(
            request.path, output_loading_info=True, **placement, **arguments
        )
    _require_read(model, config, request)
    return model


def _require_read(model: Any, config: Any, request: LoadRequest) -> None:
    """Refuses a model of its class's defaults: what the configuration names is known to have been there before."""
    if type(model.config) is type(config) and config.architectures and not model.config.architectures:
        file = os.path.join(request.base, request.arguments.get("subfolder") or "", "config.json")
        raise ReadError("transformers took it for absent when it read it again; check the disk, then retry", path=file)


def _resolve(model_class: Any, request: LoadRequest) -> tuple[Any, dict[str, Any], Any]:
    """The class to load, the arguments of its from_pretrained beside the placement, and the configuration."""
    path, base = request.path, request.base
    arguments = dict(request.arguments)
    hub = {name: value for name, value in arguments.items() if name in _FINDING_ARGUMENTS}
    config_class = getattr(model_class, "config_class", None) or transformers.AutoConfig
    with named_by_adapter(path, base):
        config = _read_config(config_class, base, hub)
    refuse_other_forms(config, base)
    if model_class is None:
        model_class = class_of(config, base, trusted=bool(hub.get("trust_remote_code")))
    if not model_class.__name__.startswith("Auto"):  # only Auto classes look for code
        hub.pop("code_revision", None)
        arguments = {name: value for name, value in arguments.items() if name != "code_revision"}
    stored = _stored_quantization(config)
    if stored is None:
        return model_class, {**arguments, "quantization_config": request.config or Int8Config()}, config
    changed, unused = config_class.from_pretrained(base, return_unused_kwargs=True, **arguments)
    changed.quantization_config = _pre_quantized_fields(stored, request.config, base)
    return model_class, {**unused, **hub, "config": changed}, config


def _stored_quantization(config: Any) -> Any:
    """The quantization_config of a configuration or of its text model, as transformers looks for it."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )


def _read_config(config_class: Any, path: str, hub: dict[str, Any]) -> Any:
    is_local = is_folder(path)
    subfolder = hub.get("subfolder") or ""
    try:
        return config_class.from_pretrained(path, **hub)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if is_local and not exists(os.path.join(path, subfolder, "config.json")):
            raise ModelNotSupportedError(
                f"there is no config.json in {os.path.join(path, subfolder)}; give the folder of a model (or "
                "`subfolder`), or fill a module of your own: pyint8.load(path, model=module)"
            ) from error
        if is_local and isinstance(error, OSError) and error.errno is not None:
            file = error.filename or os.path.join(path, subfolder, "config.json")
            problem = f"cannot be read: {error.strerror}; check the disk and its permissions, then try again"
            raise ReadError(problem, path=file, errno=error.errno) from error
        if is_local and isinstance(error, (OSError, StrictDataclassError)):
            raise ModelNotSupportedError(f"the configuration in {path} cannot be read: {error}") from error
        if ASKS_FOR_TRUST in str(error):
            raise untrusted(path) from error
        if isinstance(error, OSError):
            raise CheckpointNotFoundError(
                f"there is no folder {path} here, and the configuration of the hub id {path} cannot be had "
                f"({str(error).splitlines()[0]}); check the path or the id, the network and the token, or download it "
                f"first: `hf download {path}`",
                path=path,
            ) from error
        if subfolder and not is_local and cached_file(path, f"{subfolder}/config.json", hub) is None:
            raise CheckpointNotFoundError(
                f"the hub id {path} has no config.json in its folder {subfolder}; check `subfolder`", path=path
            ) from error
        raise ModelNotSupportedError(
            f"transformers {transformers.__version__} does not know the configuration in {path}: {error}. Install a "
            "release that does, or fill a module of your own: pyint8.load(path, model=module)"
        ) from error


def class_of(config: Any, path: str, *, trusted: bool = False) -> Any:
    """The class a configuration names.

    For code in the checkpoint's folder this is the Auto class that finds it (and asks for trust_remote_code). If that
    code is `trusted`, it wins over a class of transformers.

    Raises:
        ModelNotSupportedError: It names none, or one that transformers does not have.
    """
    architectures = getattr(config, "architectures", None) or []
    code = {name: str(at) for name, at in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in name}
    for architecture in architectures:
        for auto_class, at in code.items():
            if at.rpartition(".")[2] == architecture:
                return getattr(transformers, auto_class)
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return getattr(transformers, next(iter(code))) if trusted and len(code) == 1 else found
    named = "no class (its `architectures` is empty)"
    if architectures:
        named = f"the class {architectures[0]}, which transformers {transformers.__version__} does not have"
    raise ModelNotSupportedError(
        f"the configuration in {path} names {named}; say which to load, e.g. "
        "pyint8.load(path, model=transformers.AutoModelForCausalLM)"
    )


def _pre_quantized_fields(stored: Any, asked: Int8Config | None, path: str) -> dict[str, Any]:
    """The configuration of a pre-quantized checkpoint, changed so that transformers uses our quantizer."""
    fields = dict(stored if isinstance(stored, dict) else stored.to_dict())
    in_8bit = fields.pop("load_in_8bit", False) or fields.pop("_load_in_8bit", False)
    in_4bit = fields.get("load_in_4bit") or fields.get("_load_in_4bit")
    method = fields.get("quant_method") or ("bitsandbytes" if in_8bit or in_4bit else "a method it does not name")
    if method != "bitsandbytes" or not in_8bit:
        described = "4-bit bitsandbytes" if method == "bitsandbytes" else method
        raise ModelNotSupportedError(
            f"the checkpoint in {path} is quantized already, by {described}: pyint8 loads 16- and 32-bit checkpoints "
            "and bitsandbytes' int8 ones. Load it with transformers, or start from the unquantized checkpoint"
        )
    if asked is not None:
        raise OptionError("the checkpoint is int8 already and brings its own configuration; leave `config` out")
    if fields.get("llm_int8_has_fp16_weight"):
        raise CheckpointError(
            "it says llm_int8_has_fp16_weight, which keeps weights in 16 bit, and that they are int8; take that out of "
            "its quantization_config, if the weights are int8",
            path=os.path.join(path, "config.json"),
        )
    fields = copy.deepcopy(
        {k: v for k, v in fields.items() if k not in ("_load_in_8bit", "_load_in_4bit", "load_in_4bit")}
    )
    return {**fields, "quant_method": METHOD}


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Hides transformers' bar, which counts parameters, while ours counts bytes. Its switch is also the hub's."""
    logging = transformers.utils.logging
    hub_shown = not are_progress_bars_disabled()
    if not logging.is_progress_bar_enabled():
        yield
        return
    try:
        try:
            logging.disable_progress_bar()
            yield
        finally:
            _show_progress_bars(hub=hub_shown)
    finally:  # again: Ctrl-C may have come in between
        _show_progress_bars(hub=hub_shown)


def _show_progress_bars(*, hub: bool) -> None:
    transformers.utils.logging.enable_progress_bar()
    if not hub:
        disable_progress_bars()
