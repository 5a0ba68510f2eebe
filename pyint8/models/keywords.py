"""Keywords of a verb that mean something elsewhere, or nothing there, and the nearest name of a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

from pyint8.checkpoint.find import CODE_ARGUMENTS, FILE_ARGUMENTS
from pyint8.config import Int8Config, StreamOptions, int8_config_of
from pyint8.errors import OptionError, first_names

OWN: Mapping[str, tuple[str, ...]] = {
    "load": (
        *("device_map", "dtype", "max_memory", "headroom", "config", "model", "offload_folder", "strict", "progress"),
        *("options", "cache", "storage_options", "return_report", "process_group"),
    ),
    "convert": (
        *("device", "dtype", "config", "max_shard_size", "checksums", "fused_experts", "progress", "options"),
        *("storage_options", "process_group"),
    ),
    "inspect": ("device_map", "max_memory", "headroom", "dtype", "config", "storage_options"),
    "verify": ("against", "device", "progress", "options", "storage_options"),
    "reload": ("strict", "progress", "options", "storage_options"),
    "save": ("max_shard_size", "checksums", "push_to_hub", "private", "fused_experts"),
}
"""The arguments that each verb has by name."""

FINDING = (*FILE_ARGUMENTS, *CODE_ARGUMENTS)
"""Arguments of from_pretrained that say where a checkpoint's files and its code are found."""

# Arguments of from_pretrained and others that pyint8 has not at all.
_REPLACED = {
    "load_in_8bit": "pyint8 always loads in 8 bit",
    "load_in_4bit": "pyint8 loads in 8 bit",
    "output_loading_info": "the report, which pyint8.load gives with return_report=True, has loading_info",
    "state_dict": "pyint8 reads files; use transformers for tensors you have",
    "gguf_file": "GGUF checkpoints are not read; convert to safetensors",
    "disable_mmap": "pyint8 maps no files",
    **dict.fromkeys(
        ("push_to_hub", "private"),
        'pyint8.save(model, folder, push_to_hub="me/name") uploads what it writes, and `pyint8 convert --push-to-hub`',
    ),
}
# Names that an argument has elsewhere.
_NAMED = {
    "torch_dtype": ("dtype", "it is named dtype"),
    "device": ("device_map", 'it is named device_map: device_map="cuda", or device_map={"": 0}'),
    "device_map": ("device", 'it is named device: device="cuda:1"'),
    "quantization_config": ("config", "say what to quantize with config=pyint8.Int8Config(...)"),
}
# Fields of what another argument is, with that argument.
_FIELDS = {
    **{field.name: ("config", f"pyint8.Int8Config({field.name}=...)") for field in fields(Int8Config)},
    **{field.name: ("options", f"pyint8.StreamOptions({field.name}=...)") for field in fields(StreamOptions)},
    **{
        f"llm_int8_{theirs}": ("config", f"pyint8.Int8Config({ours}=...)")
        for theirs, ours in {
            "threshold": "threshold",
            "skip_modules": "skip_modules",
            "has_fp16_weight": "has_fp16_weight",
            "enable_fp32_cpu_offload": "fp32_cpu_offload",
        }.items()
    },
}
_OF_FROM_PRETRAINED = ("attn_implementation", "revision", "subfolder", "token", "trust_remote_code", "variant")

_verb: ContextVar[str] = ContextVar("pyint8_verb", default="load")


@contextmanager
def called(verb: str, keywords: Iterable[str]) -> Iterator[None]:
    """A call of a verb with these keywords beside its own; errors within, about keywords, name it.

    Raises:
        OptionError: A keyword belongs elsewhere; it says where.
    """
    refuse_misplaced(verb, keywords)
    before = _verb.set(verb)
    try:
        yield
    finally:
        _verb.reset(before)


def refuse_misplaced(verb: str, keywords: Iterable[str]) -> None:
    """Raises OptionError for a keyword of a verb that belongs elsewhere, saying where."""
    for name in keywords:
        advice = _advice(name, verb)
        if advice is not None:
            raise OptionError(f"{name} is not an argument of pyint8.{verb}: {advice}")


def refuse_others(verb: str, keywords: Iterable[str], known: Collection[str], why: str) -> None:
    """Raises OptionError for a keyword of a verb that nothing would read: `why` says so."""
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, [*OWN[verb], *known], n=1)
            advice = f"did you mean {near[0]}?" if near else "leave it out"
            raise OptionError(f"{name} is not an argument of pyint8.{verb}: {why}; {advice}")


def _advice(name: str, verb: str) -> str | None:
    """What to do about a keyword that a verb does not have, and something else has; None if nothing has it."""
    if name in _NAMED and _NAMED[name][0] in OWN[verb]:
        return _NAMED[name][1]
    if name in _FIELDS:
        argument, value = _FIELDS[name]
        if argument in OWN[verb]:
            return f"pass {argument}={value}"
        return f"it is for {argument}={value}, and pyint8.{verb} has no {argument}"
    if name in _REPLACED:
        return _REPLACED[name]
    meant = _NAMED[name][0] if name in ("torch_dtype", "quantization_config") else name
    takers = [f"pyint8.{other}" for other, own in OWN.items() if meant in own]
    return f"it is for {first_names(takers, len(takers))} alone" if takers else None


def unknown_keyword(name: str, taker: str) -> OptionError:
    """The error for a keyword that neither the verb that was called nor `taker`, the model's class, has."""
    verb = _verb.get()
    known = {*OWN[verb], *_OF_FROM_PRETRAINED, *_FIELDS, *_REPLACED, *_NAMED} - {name}
    near = next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)
    elsewhere = None if near is None or near in OWN[verb] else _advice(near, verb)
    advice = elsewhere or ("check its name" if near is None else f"did you mean {near}?")
    return OptionError(f"{name} is an argument neither of pyint8.{verb} nor of {taker} and its configuration; {advice}")


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
