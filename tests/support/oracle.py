"""Compares a model that pyint8 loaded with the one transformers loads, attribute by attribute and bit by bit.

A model is first described as nested plain data (no addresses, no hook ids, tensors by their bytes), then two
descriptions are compared. A difference reads "where: ours ..., theirs ..."; `where` is a path such as
"parameters/model.norm.weight/dtype", and `allow` takes fnmatch patterns of such paths.
"""

import functools
import inspect
import json
import re
import types
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform

OURS = "pyint8"
UNORDERED = {"llm_int8_skip_modules", "modules_to_not_convert"}
# An attribute of the lifecycle ours descends from; transformers 5 sets it no more, and nothing there minds it.
SERIALIZABLE = "modules//attributes/is_8bit_serializable"
SCALARS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, re.Pattern)


def peer_load(path: Path | str, cls: type, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers loads in 8 bit, and its loading info. The seed is for heads absent from the checkpoint."""
    kwargs.setdefault("quantization_config", BitsAndBytesConfig(load_in_8bit=True))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer warns when a pre-quantized checkpoint has a config of its own
        model, info = cls.from_pretrained(str(path), output_loading_info=True, **kwargs)  # type: ignore[attr-defined]
    return model, info


def _bytes_of(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    described: dict[str, Any] = {
        "type": _class_name(type(tensor)),
        "dtype": str(tensor.dtype),
        "shape": str(tuple(tensor.shape)),
        "stride": str(tensor.stride()),
        "device": str(tensor.device),
        "requires_grad": tensor.requires_grad,
        "bytes": _bytes_of(tensor) if tensor.device.type != "meta" else b"",
        "storage_bytes": tensor.untyped_storage().nbytes(),
        "attributes": {name: describe(value) for name, value in vars(tensor).items()},
    }
    codes = getattr(tensor, "CB", None)
    if isinstance(codes, torch.Tensor):
        described["CB_aliases_data"] = codes.data_ptr() == tensor.data_ptr()
    return described


def describe(value: Any, name: str = "", above: tuple[int, ...] = ()) -> Any:
    """`value` as dicts, lists, strings and bytes that are equal for equal loads."""
    if isinstance(value, SCALARS):
        return repr(value)  # tells 6 from 6.0, and an enum from its value
    if isinstance(value, torch.Tensor):
        return describe_tensor(value)
    if isinstance(value, nn.Module):
        return f"module {_class_name(type(value))}"  # described where it is registered
    if isinstance(value, type):
        return _class_name(value)
    if inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if id(value) in above:
        return "seen above"
    above = (*above, id(value))
    if isinstance(value, Mapping):
        if "_hooks" in name or name == "tied_params_map":  # keyed by a counter of the process, by addresses
            return [describe(item, "", above) for item in value.values()]
        return {str(key): describe(item, str(key), above) for key, item in value.items()}
    if isinstance(value, (set, frozenset)) or (name in UNORDERED and value is not None):
        return str(sorted(repr(item) for item in value))
    if isinstance(value, (list, tuple)):
        return [describe(item, "", above) for item in value]
    return {"type": _class_name(type(value))} | {
        key: describe(item, key, above) for key, item in _attributes(value).items()
    }


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
    slotted = {slot: getattr(value, slot) for slot in slots if not slot.startswith("__") and hasattr(value, slot)}
    return slotted | getattr(value, "__dict__", {})


def _shared(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, list[list[str]]]:
    """Which names are one object, share an address, share a storage; groups of one left out."""
    groups: dict[str, dict[int, list[str]]] = {"object": {}, "address": {}, "storage": {}}
    for name, tensor in named:
        if tensor.numel() and tensor.device.type != "meta":
            groups["object"].setdefault(id(tensor), []).append(name)
            groups["address"].setdefault(tensor.data_ptr(), []).append(name)
            groups["storage"].setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return {kind: sorted(names for names in by.values() if len(names) > 1) for kind, by in groups.items()}


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = list(model.named_buffers(remove_duplicate=False))
    modules = list(model.named_modules(remove_duplicate=False))
    registries = {"_parameters", "_buffers", "_modules"}
    return {
        "order": {
            "modules": " ".join(name for name, _ in modules),
            "parameters": " ".join(name for name, _ in parameters),
            "buffers": " ".join(name for name, _ in buffers),
            "state_dict": " ".join(model.state_dict()),
        },
        "modules": {
            name: {
                "type": _class_name(type(module)),
                "attributes": {k: describe(v, k) for k, v in vars(module).items() if k not in registries},
                "empty": sorted(k for kind in registries for k, v in vars(module)[kind].items() if v is None),
            }
            for name, module in modules
        },
        "parameters": {name: describe_tensor(parameter) for name, parameter in parameters},
        "buffers": {name: describe_tensor(buffer) for name, buffer in buffers},
        "ties": _shared([*parameters, *buffers]),
        "model": {
            "dtype": str(model.dtype),
            "device": str(model.device),
            "config": describe(model.config.to_dict()),
            "generation_config": describe(model.generation_config.to_dict()) if model.can_generate() else None,
            "memory_footprint": model.get_memory_footprint(),
        },
    }


def _leaf(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _differences(where: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            path = f"{where}/{key}" if where else key
            if key not in theirs:
                yield f"{path}: only in ours: {_leaf(ours[key])}"
            elif key not in ours:
                yield f"{path}: only in theirs: {_leaf(theirs[key])}"
            else:
                yield from _differences(path, ours[key], theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (our_item, their_item) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(f"{where}/{index}", our_item, their_item)
    elif isinstance(ours, bytes) and isinstance(theirs, bytes):
        if len(ours) != len(theirs):
            yield f"{where}: ours {len(ours)} bytes, theirs {len(theirs)}"
        elif ours != theirs:
            wrong = [index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
            yield f"{where}: {len(wrong)} of {len(ours)} bytes differ, the first at {wrong[0]}"
    elif where.endswith("/storage_bytes"):
        if ours > theirs:  # less than the peer keeps alive is no fault
            yield f"{where}: ours keeps {ours} bytes alive, theirs {theirs}"
    elif ours != theirs:
        yield f"{where}: ours {_leaf(ours)}, theirs {_leaf(theirs)}"


def differences(ours: Any, theirs: Any, allow: Iterable[str] = ()) -> list[str]:
    """Differences of two descriptions, those whose path matches a pattern of `allow` left out."""
    patterns = list(allow)
    found = _differences("", ours, theirs)
    return [line for line in found if not any(fnmatchcase(line.partition(": ")[0], p) for p in patterns)]


def show(found: list[str]) -> str:
    """For an assertion's message: pytest shortens a list to one line."""
    return "\n".join([f"{len(found)} differences", *found[:40]])


def remains(model: PreTrainedModel, package: str = OURS) -> list[str]:
    """Paths of everything reachable from the model that `package` defines."""
    found: list[str] = []
    seen: dict[int, Any] = {}  # keeps what it has seen alive, or ids would be used twice
    todo: list[tuple[str, Any]] = [("model", model)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, (*SCALARS, bytes, types.ModuleType)) or id(value) in seen:
            continue
        seen[id(value)] = value
        defined_in = value if isinstance(value, type) or inspect.isroutine(value) else type(value)
        if f"{defined_in.__module__}.".startswith(f"{package}."):
            found.append(f"remains/{path}: {defined_in.__module__}.{defined_in.__qualname__}")
            continue
        todo.extend((f"{path}/{name}", item) for name, item in _reachable(value))
    return sorted(found)


def _reachable(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"key {key}", key) for key in value)
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif isinstance(value, weakref.ref):
        yield "referent", value()
    elif isinstance(value, types.MethodType):
        yield from (("__self__", value.__self__), ("__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        yield from ((f"closure {name}", getattr(cell, "cell_contents", None)) for name, cell in cells)
        yield "__wrapped__", getattr(value, "__wrapped__", None)
    elif not isinstance(value, type):
        yield from _attributes(value).items()


def compare_models(ours: PreTrainedModel, theirs: PreTrainedModel, *, allow: Iterable[str] = ()) -> list[str]:
    """Every difference between two freshly loaded models (run it before any forward), and what remains of pyint8."""
    return differences(describe_model(ours), describe_model(theirs), allow) + remains(ours)


def compare_loading_info(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    mine, peers = ({f"loading_info/{key}": str(sorted(map(str, info[key]))) for key in keys} for info in (ours, theirs))
    return differences(mine, peers)


def _tensors_in(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return describe_tensor(output)
    if isinstance(output, Mapping):
        return {key: _tensors_in(item) for key, item in output.items()}
    return [_tensors_in(item) for item in output] if isinstance(output, (list, tuple)) else None


def compare_outputs(ours: PreTrainedModel, theirs: PreTrainedModel, inputs: Mapping[str, Any]) -> list[str]:
    """The first forward of each on the same inputs, every tensor of the output to the bit.

    Without gradients: Falcon adds in place to what bitsandbytes' matmul returns, which autograd refuses.
    """
    with torch.no_grad():
        our_output, their_output = ours(**inputs), theirs(**inputs)
    return differences({"output": _tensors_in(our_output)}, {"output": _tensors_in(their_output)})


def _describe_file(path: Path) -> Any:
    if path.suffix == ".json":
        return describe(json.loads(path.read_text()))
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        tensors = {name: describe_tensor(file.get_tensor(name)) for name in names}
        return {"order": " ".join(names), "metadata": describe(file.metadata()), "tensors": tensors}


def _describe_folder(folder: Path) -> dict[str, Any]:
    return {f"saved/{path.relative_to(folder)}": _describe_file(path) for path in sorted(folder.rglob("*"))}


def compare_saved(ours: PreTrainedModel, theirs: PreTrainedModel, tmp: Path, *, allow: Iterable[str] = ()) -> list[str]:
    """What save_pretrained writes of each. Where the peer's raises, ours must save what transformers reads back."""
    ours.save_pretrained(tmp / "ours")
    try:
        theirs.save_pretrained(tmp / "theirs")
    except NotImplementedError:  # its deserializer has no reverse_op: it cannot save what it loaded from int8
        return compare_reloaded(ours, tmp / "ours")
    return differences(_describe_folder(tmp / "ours"), _describe_folder(tmp / "theirs"), allow)


def compare_reloaded(ours: PreTrainedModel, folder: Path) -> list[str]:
    """The state dict of `ours` beside that of the model transformers loads from what `ours` saved."""
    reloaded, info = peer_load(folder, type(ours), dtype="auto", device_map={"": ours.device})
    lost = [f"reloaded/{key}: {sorted(info[key])}" for key in ("missing_keys", "unexpected_keys") if info[key]]
    saved, read = ({k: describe_tensor(v) for k, v in model.state_dict().items()} for model in (ours, reloaded))
    return lost + differences({"reloaded": saved}, {"reloaded": read}, allow=["reloaded/*/attributes/*"])


def state(model: nn.Module) -> dict[str, Any]:
    """Values of the state dict, whatever wraps them."""
    return {name: describe_tensor(tensor.data) for name, tensor in model.state_dict().items()}


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    found = compare_models(ours, theirs, allow=[SERIALIZABLE])
    assert not found, show(found)


def without_deserializers(conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """The peer's weight conversions less those that only read bitsandbytes' serialized names."""
    return [c for c in conversions if not any(hasattr(op, "hf_quantizer") for op in getattr(c, "operations", ()))]
