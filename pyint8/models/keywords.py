"""Keywords of `pyint8.load` that mean something elsewhere, and the nearest name of a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from pyint8.config import Int8Config, StreamOptions, int8_config_of
from pyint8.errors import OptionError

# Arguments of from_pretrained and others that pyint8.load has by another name, or not at all.
_REPLACED = {
    "load_in_8bit": "pyint8.load always loads in 8 bit",
    "load_in_4bit": "pyint8.load loads in 8 bit",
    "quantization_config": "say what to quantize with config=pyint8.Int8Config(...)",
    "output_loading_info": "pass return_report=True; the report has loading_info",
    "state_dict": "pyint8.load reads files; use transformers for tensors you have",
    "gguf_file": "GGUF checkpoints are not read; convert to safetensors",
    "torch_dtype": "it is named dtype",
    "device": 'it is named device_map: device_map="cuda", or device_map={"": 0}',
    "disable_mmap": "pyint8 maps no files",
    **{
        f"llm_int8_{theirs}": f"pass config=pyint8.Int8Config({ours}=...)"
        for theirs, ours in {
            "threshold": "threshold",
            "skip_modules": "skip_modules",
            "has_fp16_weight": "has_fp16_weight",
            "enable_fp32_cpu_offload": "fp32_cpu_offload",
        }.items()
    },
    **{field.name: f"pass config=pyint8.Int8Config({field.name}=...)" for field in fields(Int8Config)},
    **{field.name: f"pass options=pyint8.StreamOptions({field.name}=...)" for field in fields(StreamOptions)},
}
_OWN = ("device_map", "dtype", "max_memory", "headroom", "config", "model", "offload_folder", "strict", "progress")
_OF_FROM_PRETRAINED = ("attn_implementation", "revision", "subfolder", "token", "trust_remote_code", "variant")


def refuse_misplaced(keywords: Iterable[str]) -> None:
    """Raises OptionError for a keyword that belongs elsewhere, saying where."""
    for name in keywords:
        if name in _REPLACED:
            raise OptionError(f"{name} is not an argument of pyint8.load: {_REPLACED[name]}")


def unknown_keyword(name: str, taker: str) -> OptionError:
    """The error for a keyword that neither `pyint8.load` nor `taker`, the model's class, has."""
    known = [*_OWN, "options", "return_report", *_OF_FROM_PRETRAINED, *_REPLACED]
    near = difflib.get_close_matches(name, known, n=1)
    advice = "check its name"
    if near:
        advice = _REPLACED[near[0]] if near[0] in _REPLACED.keys() - _OWN else f"did you mean {near[0]}?"
    return OptionError(f"{name} is an argument neither of pyint8.load nor of {taker} and its configuration; {advice}")


def int8_config(value: Any) -> Int8Config | None:
    """The `config` argument: an Int8Config or None as given, or one made from a BitsAndBytesConfig of 8 bit.

    Raises:
        OptionError: It is anything else.
    """
    if value is None or isinstance(value, Int8Config):
        return value
    if hasattr(value, "llm_int8_threshold") and hasattr(value, "load_in_8bit"):
        if not value.load_in_8bit:
            raise OptionError("config is a BitsAndBytesConfig that does not say load_in_8bit=True")
        return int8_config_of(value)
    if hasattr(value, "model_type") or isinstance(value, Mapping):
        raise OptionError(
            f"config is a {type(value).__name__}, and here it says what to quantize (a pyint8.Int8Config). A model's "
            "own configuration is read from the checkpoint; change it by keywords: pyint8.load(path, num_labels=3)"
        )
    raise OptionError(f"config is {value!r:.80}; it must be a pyint8.Int8Config or None")
