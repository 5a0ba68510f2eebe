"""What nothing would read is refused: an argument that is accepted does what it says."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyint8
from pyint8 import Int8Config, StreamOptions
from pyint8.errors import CheckpointError, OptionError, RemoteError
from pyint8.models.keywords import OWN

URL = "http://127.0.0.1:9/nothing-is-here"
FIRST = ("path", "source", "folder", "model", "hub_kwargs", "hub_and_model_kwargs")
UPLOADS = r'pyint8\.save\(model, folder, push_to_hub="me/name"\) uploads .* `pyint8 convert --push-to-hub`'
STAYS = "is not an argument of pyint8.reload: the model stays as it is"
NO_CONFIG = "there is no config.json"

Verbs = dict[str, Callable[..., object]]


@pytest.fixture(scope="module")
def verbs(source: Path, int8: Path) -> Verbs:
    """Each verb, called in a way that is right, but for what is added."""
    model = pyint8.load(source, "cpu")
    return {
        "load": lambda path=source, device_map="cpu", **given: pyint8.load(path, device_map, **given),
        "convert": lambda path=source, **given: pyint8.convert(path, "not-made", **{"device": "cpu"} | given),
        "inspect": lambda path=source, **given: pyint8.inspect(path, **given),
        "verify": lambda path=int8, **given: pyint8.verify(path, **given),
        "verify against": lambda path=int8, **given: pyint8.verify(path, against=source, **given),
        "reload": lambda path=source, **given: pyint8.reload(model, path, **given),
        "save": lambda **given: pyint8.save(model, "not-made", **given),
        "inspect a file": lambda **given: pyint8.inspect(source / "model.safetensors", **given),
    }


@pytest.mark.parametrize("verb", OWN)
def test_the_arguments_of_each_verb_are_known(verb: str) -> None:
    of_load = {"model"} if verb == "load" else set()
    assert {*OWN[verb]} == {*inspect.signature(getattr(pyint8, verb)).parameters} - ({*FIRST} - of_load)


@pytest.mark.parametrize(
    ("verb", "given", "says"),
    [
        (
            "verify",
            {"agianst": "x"},
            r"agianst is not an argument of pyint8.verify: without `against` .*mean against\?",
        ),
        ("verify", {"foo": 1}, "foo is not an argument of pyint8.verify: .* leave it out"),
        (
            "verify",
            {"dtype": "float32"},
            "dtype .* pyint8.verify: it is for pyint8.load, pyint8.convert, pyint8.ins",
        ),
        ("verify", {"process_group": 1}, "process_group is not an argument of pyint8.verify"),
        ("verify", {"device_map": "cpu"}, "device_map is not an argument of pyint8.verify: it is named device"),
        ("verify", {"device": "nonsense"}, "device says where the weights of `against` are quantized"),
        ("verify", {"options": StreamOptions(timeline=True)}, "timeline is for what returns a LoadReport"),
        ("verify against", {"device_map": "cpu"}, "device_map is not an argument of pyint8.verify: it is named device"),
        ("verify against", {"dtype": "float32"}, "dtype is not an argument of pyint8.verify"),
        ("verify against", {"foo": 1}, "foo is an argument neither of pyint8.verify nor of LlamaForCausalLM"),
        ("convert", {"device_map": "cpu"}, "device_map is not an argument of pyint8.convert: it is named device"),
        (
            "convert",
            {"max_memory": {0: 1}},
            "max_memory .* pyint8.convert: it is for pyint8.load, pyint8.inspect alone",
        ),
        ("convert", {"headroom": 1}, "headroom .* pyint8.convert: it is for pyint8.load, pyint8.inspect alone"),
        ("convert", {"offload_folder": "x"}, "offload_folder is not an argument of pyint8.convert"),
        ("convert", {"max_shard_siz": 1}, r"neither of pyint8.convert nor .* did you mean max_shard_size\?"),
        *((verb, {"push_to_hub": "me/x"}, UPLOADS) for verb in ("load", "convert", "inspect", "verify", "reload")),
        *((verb, {"private": True}, UPLOADS) for verb in ("load", "convert", "inspect a file", "verify against")),
        ("save", {"private": True}, "private is for push_to_hub"),
        ("reload", {"rms_norm_eps": 0.5}, "rms_norm_eps is 0.5, and 1e-06 in the model's configuration"),
        ("reload", {"attn_implementation": "eager"}, "attn_implementation is 'eager', and 'sdpa' in the model's"),
        ("reload", {"varaint": 1}, r"varaint is not an argument of pyint8.reload: .* did you mean variant\?"),
        ("reload", {"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes makes up weights"),
        *(("reload", {name: 1}, STAYS) for name in ("device", "device_map", "torch_dtype", "max_memory")),
        *(("inspect a file", {name: "x"}, f"{name} is about a model: {NO_CONFIG}") for name in ("device_map", "dtype")),
        *(("inspect a file", {name: 5}, f"{name} is about a model") for name in ("max_memory", "headroom")),
        ("inspect a file", {"config": Int8Config()}, "config is about a model"),
        (
            "inspect a file",
            {"revisoin": 1},
            r"revisoin is not an argument of pyint8.inspect: .* did you mean revision\?",
        ),
        ("load", {"max_memory": {"cpu": "1KB"}}, "max_memory is for planned device maps .*, not for 'cpu'"),
        ("load", {"max_memory": {0: 1}, "device_map": {"": "cpu"}}, "max_memory is for planned device maps"),
        ("load", {"max_memory": {"cuda:0": 1}, "device_map": "auto"}, "max_memory has the key 'cuda:0'; keys are num"),
        ("inspect", {"max_memory": {"cuda:0": 1}}, "max_memory has the key 'cuda:0'"),
        *(
            (verb, {"path": URL, name: value}, f"{name} is for the hub, and the checkpoint is under a URL")
            for verb in ("load", "convert", "inspect", "verify", "reload")
            for name, value in {"revision": "main", "token": True}.items()
        ),
        *(
            ("inspect", {"path": URL, name: "x"}, f"{name} is for the hub")
            for name in ("cache_dir", "proxies", "force_download", "local_files_only")
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(verb: str, given: dict[str, Any], says: str, verbs: Verbs) -> None:
    with pytest.raises(OptionError, match=says):
        verbs[verb](**given)


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("verify", {"revision": "main", "trust_remote_code": True, "use_safetensors": True, "code_revision": None}),
        ("verify against", {"use_cache": False, "device": "cpu"}),
        ("reload", {"attn_implementation": "sdpa", "rms_norm_eps": 1e-6, "token": None, "use_safetensors": True}),
        ("reload", {"trust_remote_code": True, "code_revision": None, "ignore_mismatched_sizes": False}),
        ("inspect a file", {"device_map": "auto", "dtype": "auto", "config": None, "revision": "main"}),
        ("load", {"max_memory": None, "revision": "main"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_read_or_says_what_is_so_is_accepted(verb: str, given: dict[str, Any], verbs: Verbs) -> None:
    assert verbs[verb](**given)


def test_the_hub_s_arguments_are_of_use_where_one_of_two_is_no_url(int8: Path) -> None:
    with pytest.raises(RemoteError):
        pyint8.verify(int8, against=URL, revision="main")


def test_drop_in_loads_take_max_memory_as_transformers_does(source: Path) -> None:
    import transformers

    for how in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        model = transformers.LlamaForCausalLM.from_pretrained(
            source, quantization_config=Int8Config(), max_memory={"cpu": "1KB"}, **how
        )
        assert model.lm_head.weight.device.type == "cpu"


def test_inspect_is_as_strict_as_its_config(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("llama_sharded", "bf16")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    places["model.norm.weight"] = next(file for file in places.values() if file != places["model.norm.weight"])
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        pyint8.inspect(folder)
    assert pyint8.inspect(folder, config=Int8Config(strict=False)).fits
