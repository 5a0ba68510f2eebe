"""What to do about a folder that holds no checkpoint as transformers names it, and about files of other formats.

Advice must lead somewhere: a shard alone, or a file of another name, is not what a transformers model is loaded from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from pyint8.errors import first_names
from pyint8.host.files import open_file

_FROM_FRAMEWORK = "load it with transformers 4 and from_{}=True, then call save_pretrained(new_folder)"
_FROM_GGUF = (
    "load it with transformers and gguf_file=<its name> (where transformers has GgufConfig, also "
    "quantization_config=GgufConfig(dequantize=True)), then call save_pretrained(new_folder)"
)
_FORMATS = {
    ".gguf": ("GGUF", _FROM_GGUF),
    ".h5": ("TensorFlow", _FROM_FRAMEWORK.format("tf")),
    ".ckpt": ("TensorFlow", _FROM_FRAMEWORK.format("tf")),
    ".msgpack": ("Flax", _FROM_FRAMEWORK.format("flax")),
}
_OTHER_WEIGHTS = ("tf_model", "model.ckpt.", "flax_model")
_TENSORFLOW_TABLE = bytes.fromhex("57fb808b247547db")
"""What TensorFlow's own checkpoint files end with."""

_STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_VARIANT = re.compile(
    r"(?:model\.(?P<a>[^.-]+)\.safetensors|model\.safetensors\.index\.(?P<b>[^.]+)\.json"
    r"|pytorch_model\.(?P<c>[^.-]+)\.bin|pytorch_model\.bin\.index\.(?P<d>[^.]+)\.json)"
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)\.(?P<format>safetensors|bin)")
_NAMES_IN = {
    "safetensors": "from safetensors import safe_open as f; names = lambda p: f(p, 'pt').keys()",
    "bin": "from torch import load as f; names = lambda p: f(p, map_location='meta')",
}
_REBUILD = (
    "python -c \"import glob, json; {names}; json.dump({{'metadata': {{}}, 'weight_map': {{n: p for p in "
    "sorted(glob.glob('{shards}')) for n in names(p)}}}}, open('{index}', 'w'))\""
)


def advice_for_file(path: str) -> str | None:
    """Say how to convert the weights in a file (or in those of an index) to safetensors; None if there is no need.

    Only of a `.ckpt`, as PyTorch Lightning names its files too, the end is looked at.
    """
    name = os.path.basename(path)
    for extension, (kind, advice) in _FORMATS.items():
        if f"{extension}." in f"{name}." and (not name.endswith(".ckpt") or _is_tensorflow_table(path)):
            return f"{name} holds {kind} weights; convert them to safetensors: {advice}"
    return None


def advice_for_folder(names: Sequence[str], looked_for: Sequence[str]) -> str:
    """Say what to do, as the end of a sentence, by the names of what is there.

    Args:
        names: What the folder holds.
        looked_for: What it does not.
    """
    for advice in (_left_out, _variant, _own_layout, _shards, _adapter, _by_another_name, _other_format):
        found = advice(names, looked_for)
        if found is not None:
            return found
    return "; check the path, or save a model there with save_pretrained"


def _is_tensorflow_table(path: str) -> bool:
    with open_file(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - len(_TENSORFLOW_TABLE)))
        return file.read() == _TENSORFLOW_TABLE


def _left_out(names: Sequence[str], looked_for: Sequence[str]) -> str | None:
    found = [name for name in _STANDARD if name in names]
    by = "use_safetensors" if looked_for[0] in _STANDARD else "variant"
    return f", but {found[0]}; call without {by} to load that" if found else None


def _variant(names: Sequence[str], looked_for: Sequence[str]) -> str | None:
    for name in names:
        match = _VARIANT.fullmatch(name)
        if match is not None:
            variant = next(filter(None, match.groups()))
            is_asked_for = any(f".{variant}." in other for other in looked_for)
            do = "call without use_safetensors" if is_asked_for else f'pass variant="{variant}"'
            return f", but {name}; {do} to load that"
    return None


def _own_layout(names: Sequence[str], _: Sequence[str]) -> str | None:
    """Of Mistral's and Meta's own code; their repositories mostly have transformers' layout too."""
    for extension, maker, model, usual in (
        (".safetensors", "Mistral", "mistral", _STANDARD[0]),
        (".pth", "Meta", "llama", _STANDARD[2]),
    ):
        found = [name for name in names if name.startswith("consolidated") and name.endswith(extension)]
        if found:
            return (
                f", but {first_names(found)}: the layout of {maker}'s own code, in which tensors have other names. "
                "Download the same model's files for transformers (config.json, model*.safetensors and their index), "
                f"or convert it with convert_{model}_weights_to_hf.py of transformers' source "
                f"(src/transformers/models/{model}); "
                f"if its tensors have transformers' names all the same, rename it to {usual}"
            )
    return None


def _shards(names: Sequence[str], looked_for: Sequence[str]) -> str | None:
    shards = [match for match in map(_SHARD.fullmatch, names) if match is not None]
    if not shards:
        return None
    one = shards[0]
    index = next((name for name in looked_for if f".{one['format']}.index." in name), None)
    if index is None:
        return f", but {one[0]}; call without use_safetensors to load that"
    present = {match["number"] for match in shards if match["stem"] == one["stem"]}
    missing = [str(number) for number in range(1, int(one["count"]) + 1) if f"{number:05}" not in present]
    too = f" (shards {first_names(missing)} of {int(one['count'])} are missing too)" if missing else ""
    pattern = f"{one['stem']}-*-of-{one['count']}{one['rest']}.{one['format']}"
    command = _REBUILD.format(names=_NAMES_IN[one["format"]], shards=pattern, index=index)
    return (
        f", but {first_names([match[0] for match in shards])}, which are shards without their index. "
        f"Download {index}{too}, or, with all shards there, make it, in that folder: {command}"
    )


def _adapter(names: Sequence[str], _: Sequence[str]) -> str | None:
    found = next((name for name in names if name.startswith("adapter_model.")), None)
    if found is None:
        return None
    return (
        f", but {found}, of a PEFT adapter: load the model that it was made for, then model.load_adapter(folder) "
        "(its adapter_config.json names that model)"
    )


def _by_another_name(names: Sequence[str], looked_for: Sequence[str]) -> str | None:
    usual = {name.rpartition(".")[2]: name for name in reversed(looked_for)}
    for name in names:
        is_weights = name.endswith((".safetensors", ".safetensors.index.json", ".ckpt")) or name.startswith(
            "pytorch_model"
        )
        if is_weights:
            target = usual.get(name.rpartition(".")[2])
            rename = "" if target is None else f"for a transformers model, rename it to {target}; "
            return f", but {name}; {rename}for a module of your own, give its path: pyint8.load(path, model=module)"
    return None


def _other_format(names: Sequence[str], _: Sequence[str]) -> str | None:
    weights = (name for name in names if name.startswith(_OTHER_WEIGHTS) or name.endswith(".gguf"))
    found = next(filter(None, map(advice_for_file, weights)), None)
    return None if found is None else f": {found}"
