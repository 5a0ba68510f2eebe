"""Weights that int8 cannot hold, shapes that are let pass, and arguments that mean nothing."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import SERIALIZABLE, compare_loading_info, compare_models, peer_load, show
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config, StreamOptions
from pyint8.errors import CheckpointError, NonFiniteWeightError, OptionError, PlacementError, Pyint8Error

pytestmark = pytest.mark.usefixtures("nothing_left")

Q_PROJ, EMBED = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
NORM = "model.norm.weight"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
C_ATTN = "transformer.h.1.attn.c_attn.weight"
Copy = Callable[..., Path]
# Of a Linear's weight [out, in] and a Conv1D's [in, out]: where the value is put, and the output row it spoils.
PLACES = {"llama": (Q_PROJ, (11, 3), 11), "gpt2": (C_ATTN, (3, 50), 50)}


def spoil(folder: Path, name: str, at: tuple[int, ...], value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][at] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def same_as_the_peer(folder: Path, name: str, **kwargs: Any) -> list[str]:
    theirs, _ = peer_load(folder, ZOO[name].cls, dtype=torch.float16, device_map="cpu")
    ours = pyint8.load(folder, "cpu", dtype=torch.float16, strict=False, **kwargs)
    return compare_models(ours, theirs, allow=[SERIALIZABLE])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 7e4], ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_a_weight_int8_cannot_hold(name: str, value: float, copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of(name, "bf16")
    tensor, at, row = PLACES[name]
    spoil(folder, tensor, at, value)
    with pytest.raises(NonFiniteWeightError, match=rf"row {row} has NaN, infinity, .*strict=False") as caught:
        pyint8.load(folder, "cpu", dtype=torch.float16)
    assert caught.value.tensor == tensor
    assert tensor in str(caught.value)
    with caplog.at_level(logging.WARNING, "pyint8"):
        found = same_as_the_peer(folder, name)
    assert not found, show(found)
    (record,) = (record for record in caplog.records if record.name.startswith("pyint8."))
    assert f"{tensor} (row {row})" in record.getMessage()


def test_a_bad_weight_is_found_in_its_file(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    spoil(folder, Q_PROJ, (11, 3), torch.nan)
    with pytest.raises(NonFiniteWeightError) as caught:
        pyint8.load(folder, "cpu", dtype=torch.float16)
    assert caught.value.path == str(folder / "model.safetensors")


def test_all_bad_weights_are_named(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of("llama", "bf16")
    spoil(folder, Q_PROJ, (11, 3), torch.nan)
    spoil(folder, UP_PROJ, (60, 0), 1e5)
    with pytest.raises(NonFiniteWeightError) as caught:
        pyint8.load(folder, "cpu", dtype=torch.float16)
    texts = [str(caught.value)]
    with caplog.at_level(logging.WARNING, "pyint8"):
        pyint8.load(folder, "cpu", dtype=torch.float16, strict=False)
    texts += [record.getMessage() for record in caplog.records if record.name.startswith("pyint8.")]
    assert len(texts) == 2
    assert all(f"{Q_PROJ} (row 11), {UP_PROJ} (row 60)" in text for text in texts)


def test_a_row_is_counted_from_the_first_band(tmp_path: Path) -> None:
    weight = torch.randn(600, 256)
    weight[500, 9] = torch.inf
    save_file({"0.weight": weight}, tmp_path / "x.safetensors")
    module = nn.Sequential(nn.Linear(256, 600, bias=False))
    with pytest.raises(NonFiniteWeightError, match=r"tensor '0\.weight'.*: row 500 has"):
        pyint8.load(
            tmp_path / "x.safetensors",
            "cpu",
            model=module,
            config=Int8Config(skip_modules=[]),
            options=StreamOptions(host_scratch=1 << 20),
        )


def test_an_overflow_in_a_cast_that_nobody_quantizes(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of("llama", "bf16")
    spoil(folder, EMBED, (5, 0), 1e5)
    with pytest.raises(NonFiniteWeightError, match="row 5 has NaN, infinity, or a value that float16") as caught:
        pyint8.load(folder, "cpu", dtype=torch.float16)
    assert caught.value.tensor == EMBED
    with caplog.at_level(logging.WARNING, "pyint8"):
        found = same_as_the_peer(folder, "llama")
    assert not found, show(found)
    assert f"{EMBED} (row 5)" in caplog.text
    assert pyint8.load(folder, "cpu", dtype="auto").get_parameter(EMBED)[5, 0] > 99_000


def test_an_overflow_in_what_is_fused(copy_of: Copy) -> None:
    folder = copy_of("mixtral", "bf16")
    spoil(folder, EXPERT, (2, 0), 1e5)
    with pytest.raises(NonFiniteWeightError, match="a value that float16") as caught:
        pyint8.load(folder, "cpu", dtype=torch.float16)
    assert caught.value.tensor in (EXPERT, "model.layers.0.mlp.experts.gate_up_proj")


def test_a_weight_that_is_no_real_number_is_not_quantized(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    tensors = load_file(folder / "model.safetensors")
    tensors[Q_PROJ] = tensors[Q_PROJ] * 1j
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="C64") as caught:
        pyint8.load(folder, "cpu")
    assert caught.value.tensor == Q_PROJ


# --- shapes -----------------------------------------------------------------------------------------------------------


def shorten(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][:9].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", [NORM, EMBED])
def test_mismatched_sizes_can_be_ignored_as_in_transformers(name: str, copy_of: Copy) -> None:
    folder = copy_of("llama")
    shorten(folder, name)
    kwargs: dict[str, Any] = {"dtype": torch.float16, "device_map": "cpu", "ignore_mismatched_sizes": True}
    theirs, info = peer_load(folder, ZOO["llama"].cls, **kwargs)
    torch.manual_seed(0)
    ours, report = pyint8.load(folder, return_report=True, **kwargs)
    found = compare_loading_info(report.loading_info, info)
    found += compare_models(ours, theirs, allow=[SERIALIZABLE])
    assert info["mismatched_keys"]
    assert not found, show(found)


def test_a_mismatched_linear_is_ordinary_and_new(copy_of: Copy) -> None:
    folder = copy_of("llama")
    shorten(folder, Q_PROJ)
    model, report = pyint8.load(folder, "cpu", return_report=True, ignore_mismatched_sizes=True)
    module = model.get_submodule(Q_PROJ.removesuffix(".weight"))
    assert type(module) is nn.Linear
    assert module.weight.shape == (64, 64)
    assert report.skipped[Q_PROJ.removesuffix(".weight")] == "its weight in the checkpoint has another shape"
    assert {key[0] for key in report.loading_info["mismatched_keys"]} == {Q_PROJ}


# --- arguments --------------------------------------------------------------------------------------------------------

INT8_CONFIG = r"must be a pyint8\.Int8Config or None"
ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"config": ()}, rf"config is \(\); it {INT8_CONFIG}"),
    ({"config": StreamOptions()}, rf"config is StreamOptions.*; it {INT8_CONFIG}"),
    ({"options": Int8Config()}, r"options is Int8Config.*; it must be a pyint8\.StreamOptions or None"),
    ({"load_in_8bit": True}, "load_in_8bit is not an argument of pyint8.load: pyint8 always loads in 8 bit"),
    ({"load_in_4bit": True}, "load_in_4bit is not an argument"),
    ({"quantization_config": None}, r"quantization_config is not an .*: .* config=pyint8\.Int8Config\(\.\.\.\)"),
    ({"output_loading_info": True}, "output_loading_info is not an argument .* return_report=True"),
    ({"state_dict": {}}, "state_dict is not an argument of pyint8.load: pyint8 reads files"),
    ({"gguf_file": "x.gguf"}, "gguf_file is not an argument .* convert to safetensors"),
    ({"torch_dtype": "auto"}, "torch_dtype is not an argument of pyint8.load: it is named dtype"),
    ({"device_map": "nonsense"}, "device_map.*nonsense.*auto"),
    ({"device_map": 3.5}, r"device_map.*3\.5"),
    ({"device_map": {"": "nonsense"}}, "device_map.*nonsense"),
    ({"device_map": {}}, "device_map has no entry"),
    ({"dtype": "nonsense"}, "dtype.*nonsense.*auto"),
    ({"dtype": 5}, "dtype.*5.*auto"),
    ({"model": 5}, "model.*5"),
    ({"model": "LlamaForCausalLM"}, "model.*LlamaForCausalLM"),
    ({"model": dict}, "model.*dict"),
    ({"device_map": "auto", "max_memory": 5}, "max_memory.*5"),
    (
        {"device_map": "auto", "max_memory": {"cpu": "lots"}},
        "max_memory of 'cpu' is 'lots'; it must be a number of bytes",
    ),
    ({"device_map": "auto", "max_memory": {0: -1}}, "max_memory of 0 is -1; it must be"),
    ({"dtype": {"": torch.float16, "vision_config": 5}}, "dtype is 5; it must be"),
    ({"dtype": {"": "auto"}}, "dtype is {'': 'auto'}; \"auto\" and None stand alone"),
]


@pytest.mark.parametrize(
    ("wrong", "says"), ARGUMENTS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_nonsense_is_refused(wrong: dict[str, Any], says: str, checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    with pytest.raises(Pyint8Error, match=says) as caught:
        pyint8.load(folder, **{"device_map": "cpu"} | wrong)
    assert isinstance(caught.value, ValueError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is a device")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:1", torch.device("cuda"), {"": "cuda"}], ids=str)
def test_a_gpu_that_is_not_there(device_map: Any, checkpoints: CheckpointStore) -> None:
    with pytest.raises(PlacementError, match="finds no such device here"):
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), device_map)


@pytest.mark.parametrize("path", [None, 5, ["a"]], ids=str)
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(OptionError, match="it must be a folder or a hub id"):
        pyint8.load(path, "cpu")


def test_a_path_of_bytes_is_one(checkpoints: CheckpointStore) -> None:
    assert pyint8.load(os.fsencode(checkpoints.folder(ZOO["llama"], "bf16")), "cpu")  # type: ignore[arg-type]


def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not UTF-8"):
        pyint8.load(os.fsencode(tmp_path) + b"/\xff", "cpu")  # type: ignore[arg-type]


def test_a_transformers_model_is_named_by_its_class(checkpoints: CheckpointStore) -> None:
    """What was saved of it would be codes without scales: nothing would say that it is quantized."""
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    with pytest.raises(OptionError, match="give its class, model=LlamaForCausalLM"):
        pyint8.load(folder, "cpu", model=model)


def test_one_module_has_one_dtype(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="dtype is a dict, which is for the parts of a transformers model"):
        pyint8.load(tmp_path / "x.safetensors", "cpu", model=nn.Linear(2, 2, bias=False), dtype={"": torch.float16})


def test_a_module_takes_no_arguments_for_transformers(checkpoints: CheckpointStore) -> None:
    with pytest.raises(OptionError, match="mean nothing for a module of your own: revision, token"):
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu", model=nn.Identity(), token="x", revision="main")


def test_an_int8_checkpoint_brings_its_config(checkpoints: CheckpointStore) -> None:
    with pytest.raises(OptionError, match="int8 already and brings its own configuration; leave `config` out"):
        pyint8.load(checkpoints.folder(ZOO["llama"], PREQUANTIZED), "cpu", config=Int8Config())


def test_a_file_is_no_model(checkpoints: CheckpointStore) -> None:
    """There is no configuration beside it that transformers would look at."""
    with pytest.raises(Pyint8Error, match=r"folder|model="):
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16") / "model.safetensors", "cpu")


def test_a_bad_variable_is_said_before_anything_is_read(
    checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYINT8_THREADS", "none")
    with pytest.raises(OptionError, match="PYINT8_THREADS is 'none'"):
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu")
    assert pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu", options=StreamOptions(threads=1))
