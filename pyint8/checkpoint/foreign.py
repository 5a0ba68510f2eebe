"""Checkpoints of other formats: recognised by name, to say how to convert them."""

from __future__ import annotations

from collections.abc import Iterable

_FROM_FRAMEWORK = "load it with transformers 4 and from_{}=True, then call save_pretrained(new_folder)"
_FORMATS = {
    ".gguf": ("GGUF", "load it with transformers and gguf_file=<its name>, then call save_pretrained(new_folder)"),
    ".h5": ("TensorFlow", _FROM_FRAMEWORK.format("tf")),
    ".ckpt": ("TensorFlow", _FROM_FRAMEWORK.format("tf")),
    ".msgpack": ("Flax", _FROM_FRAMEWORK.format("flax")),
}
_WEIGHTS = ("tf_model", "model.ckpt", "flax_model")


def advice_for_file(name: str) -> str | None:
    """Say how to convert the weights in a file of this name (or in its index) to safetensors; None if unknown."""
    for extension, (kind, advice) in _FORMATS.items():
        if f"{extension}." in f"{name}.":
            return f"{name} holds {kind} weights; convert them to safetensors: {advice}"
    return None


def advice_for_folder(names: Iterable[str]) -> str | None:
    """Say the same of the first file among these that holds weights of another format; None if there is none."""
    weights = (name for name in names if name.startswith(_WEIGHTS) or name.endswith(".gguf"))
    return next(filter(None, map(advice_for_file, weights)), None)
