"""What nothing would read is refused: an argument that is accepted does what it says."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config, StreamOptions
from pyint8.errors import CheckpointError, OptionError, PlacementError, RemoteError
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
    for how in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        model = LlamaForCausalLM.from_pretrained(
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


# --- what is said, since it may be meant ------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


@pytest.mark.parametrize("drop_in", [False, True])
@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ({"": "cpu", "model.layerz.1": "cpu"}, ["have no effect: 'model.layerz.1' (nearest: 'model.layers.1')"]),
        (
            {"model": "cpu", "lm_haed": "cpu"},
            ["have no effect: 'lm_haed' (nearest: 'lm_head')", "no entry for lm_head.weight: transformers puts"],
        ),
        ({"model": "cpu", "lm_head": "cpu"}, []),
        ({"model": "cpu", "lm_head.weight": "cpu"}, []),
        ({"": "cpu"}, []),
    ],
    ids=str,
)
def test_entries_of_a_device_map_that_name_nothing(
    device_map: dict[str, str], says: list[str], drop_in: bool, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if drop_in:
        model = LlamaForCausalLM.from_pretrained(source, device_map=device_map, quantization_config=Int8Config())
    else:
        model = pyint8.load(source, device_map)
    found = told(caplog, "device map")
    assert len(found) == len(says)
    assert all(part in message for part, message in zip(says, found, strict=True))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_map_of_several_devices_has_an_entry_for_all(source: Path, tmp_path: Path) -> None:
    """transformers refuses it too, once all is loaded."""
    offload = Int8Config(fp32_cpu_offload=True)
    with pytest.raises(PlacementError, match=r"no entry for lm_head\.weight"):
        pyint8.load(source, {"model": "cpu", "model.norm": "disk"}, config=offload, offload_folder=tmp_path)


def test_a_module_s_own_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    pyint8.load(tmp_path, {"0": "cpu", "1": "cpu", "first": "cpu"}, model=net)
    assert told(caplog, "device map") == [
        "of the device map, these name nothing in this Sequential, so they have no effect: 'first'"
    ]


@pytest.mark.parametrize(("name", "said"), [("llama", 1), ("mixtral", 0)])
def test_experts_of_a_model_without_them(
    name: str, said: int, checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", config=Int8Config(experts=True))
    assert len(told(caplog, "experts=True has no effect")) == said


def test_sixteen_bit_weights_of_an_int8_checkpoint(int8: Path, tmp_path: Path) -> None:
    sixteen = Int8Config(has_fp16_weight=True)
    net = nn.Sequential(nn.Linear(32, 32))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    pyint8.save(pyint8.load(tmp_path, "cpu", model=net, config=Int8Config(skip_modules=[])), tmp_path / "int8")
    with pytest.raises(OptionError, match="has_fp16_weight keeps weights in 16 bit, and the checkpoint is int8"):
        pyint8.load(tmp_path / "int8", "cpu", model=nn.Sequential(nn.Linear(32, 32)), config=sixteen)
    copy = shutil.copytree(int8, tmp_path / "copy")
    described = json.loads((copy / "config.json").read_text())
    described["quantization_config"]["llm_int8_has_fp16_weight"] = True
    (copy / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"llm_int8_has_fp16_weight.*take that out") as caught:
        pyint8.load(copy, "cpu")
    assert caught.value.path == str(copy / "config.json")
    with pytest.raises(OptionError, match="has_fp16_weight"), pyint8.takeover():
        LlamaForCausalLM.from_pretrained(copy, device_map="cpu")


def test_a_class_whose_maps_leave_out_what_transformers_places_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_no_placement_params", ["lm_head.weight"], raising=False)
    kwargs: dict[str, Any] = {"config": Int8Config(fp32_cpu_offload=True), "offload_folder": tmp_path}
    modules = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    model = pyint8.load(source, {**dict.fromkeys(modules, "cpu"), "model.layers.1": "disk"}, **kwargs)
    assert model.lm_head.weight.device.type == "cpu"
