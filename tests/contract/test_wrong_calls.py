"""Wrong calls are refused at once, by a Pyint8Error that says what to do instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config, StreamOptions
from pyint8.errors import (
    CheckpointNotFoundError,
    DependencyVersionError,
    MissingDependencyError,
    ModelNotSupportedError,
    OptionError,
    PlacementError,
    Pyint8Error,
)
from pyint8.models.transformers import releases

Load = Callable[..., Any]


@pytest.mark.parametrize("name", ["threshold", "skip_modules", "has_fp16_weight", "fp32_cpu_offload"])
def test_fields_of_the_config_are_pointed_to_it(name: str, load: Load) -> None:
    with pytest.raises(OptionError, match=rf"pass config=pyint8.Int8Config\({name}=...\)"):
        load(**{name: None})


@pytest.mark.parametrize("name", ["threads", "slot_bytes", "device_scratch", "direct_io", "libcuda"])
def test_fields_of_the_options_are_pointed_to_them(name: str, load: Load) -> None:
    with pytest.raises(OptionError, match=rf"pass options=pyint8.StreamOptions\({name}=...\)"):
        load(**{name: None})


def test_names_of_bitsandbytes_config_are_translated(load: Load) -> None:
    with pytest.raises(OptionError, match=r"pass config=pyint8.Int8Config\(fp32_cpu_offload=...\)"):
        load(llm_int8_enable_fp32_cpu_offload=True)
    with pytest.raises(OptionError, match=r"pass config=pyint8.Int8Config\(threshold=...\)"):
        load(llm_int8_threshold=6.0)
    with pytest.raises(OptionError, match="it is named device_map"):
        load(device="cpu")


@pytest.mark.parametrize(
    ("typo", "meant"), [("dtpye", "dtype"), ("max_memry", "max_memory"), ("subfolde", "subfolder")]
)
@pytest.mark.parametrize("checkpoint", ["bf16", PREQUANTIZED])
def test_a_typo_is_told_the_nearest_name(typo: str, meant: str, checkpoint: str, load: Load) -> None:
    with pytest.raises(OptionError, match=f"{typo} is an argument neither of .* did you mean {meant}"):
        load(checkpoint=checkpoint, **{typo: 1})


def test_a_typo_of_a_misplaced_name_is_told_its_place(load: Load) -> None:
    with pytest.raises(OptionError, match=r"skip_module is an argument neither .* pass config=pyint8.Int8Config\("):
        load(skip_module=["lm_head"])
    with pytest.raises(OptionError, match=r"zzz is an argument neither of pyint8.load nor of LlamaForCausalLM"):
        load(zzz=1)


def test_a_type_error_of_the_models_own_is_left_alone(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'inner'")

    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(TypeError, match="'inner'"):
        load()


def test_a_bitsandbytes_config_is_taken_as_what_it_means(load: Load) -> None:
    given = tf.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=3.5, llm_int8_skip_modules=["lm_head", "q_proj"]
    )
    model = load(config=given)
    layer = model.model.layers[0].self_attn
    assert type(layer.q_proj) is torch.nn.Linear
    assert layer.k_proj.state.threshold == 3.5
    with pytest.raises(OptionError, match="does not say load_in_8bit=True"):
        load(config=tf.BitsAndBytesConfig(load_in_4bit=True))


def test_a_models_configuration_is_no_int8_config(load: Load) -> None:
    with pytest.raises(OptionError, match=r"config is a LlamaConfig, and here it says what to quantize.*keywords"):
        load(config=tf.LlamaConfig())
    with pytest.raises(OptionError, match="config is a dict, and here it says what to quantize"):
        load(config={"load_in_8bit": True})


def test_a_device_map_of_numbers_is_no_map_of_modules(load: Load) -> None:
    with pytest.raises(PlacementError, match="device_map has the key 0; keys are names of modules"):
        load(device_map={0: "cpu"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is a device")
@pytest.mark.parametrize("device_map", [0, 3, "cuda", "cuda:1", {"": 0}, {"": "cuda:0"}, "mps", "xpu:1"], ids=str)
def test_a_device_that_is_not_there(device_map: Any, load: Load, checkpoints: CheckpointStore) -> None:
    with pytest.raises(PlacementError, match=r'finds no such device here.*device_map="cpu"'):
        load(device_map=device_map)
    if device_map == {"": 0}:  # what the hooks are given
        folder = checkpoints.folder(ZOO["llama"], "bf16")
        with pytest.raises(PlacementError, match="finds no such device here"):
            tf.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, quantization_config=Int8Config())


def test_a_gpu_beyond_those_there(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlacementError, match=r"device_map names 2, and torch .* finds 2 of the kind 'cuda' here"):
        load(device_map=2)


@pytest.mark.parametrize("how", [{"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 1000}}])
def test_a_model_on_the_disk_alone(how: dict[str, Any], load: Load, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"on the disk \(.*Put all of the model on the CPU") as caught:
        load(offload_folder=tmp_path, **how)
    assert "beside" not in str(caught.value)


@pytest.mark.parametrize("version", ["4.57.3", "5.7.0", "6.0.0", "6.0.0.dev0"])
@pytest.mark.parametrize("way", ["load", "config", "takeover"])
def test_a_release_of_transformers_out_of_the_range(
    version: str, way: str, load: Load, checkpoints: CheckpointStore, installed: Callable[..., None]
) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")  # made before
    installed(transformers=version)
    ways: dict[str, Callable[[], object]] = {
        "load": lambda: load(folder=folder),
        "config": lambda: Int8Config().quant_method,
        "takeover": pyint8.takeover,
    }
    with pytest.raises(DependencyVersionError, match=rf'{version} is installed.*"transformers>=5.8,<6"'):
        ways[way]()


def test_transformers_is_missing(load: Load, installed: Callable[..., None]) -> None:
    installed(transformers=None)
    with pytest.raises(MissingDependencyError, match="transformers models need transformers"):
        pyint8.load("anywhere")


@pytest.mark.parametrize("version", ["5.8.0", "5.24.1", "5.25.0.dev0", "5.99"])
def test_a_release_of_transformers_in_the_range(
    version: str, installed: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    installed(transformers=version)
    with caplog.at_level("INFO", "pyint8"):
        releases.require_transformers()
    assert ("newer than the releases known to work, 5.8 to 5.24" in caplog.text) is (version in ("5.25.0.dev0", "5.99"))


def test_a_mistyped_relative_folder_never_reaches_the_hub(
    checkpoints: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(checkpoints.folder(ZOO["llama"], "bf16"))
    monkeypatch.chdir(tmp_path)
    assert pyint8.load("models/smollm2", "cpu")
    start = time.monotonic()
    with pytest.raises(CheckpointNotFoundError, match=r"models has no smolm2 in it; did you mean models/smollm2\?"):
        pyint8.load("models/smolm2", "cpu")
    with pytest.raises(CheckpointNotFoundError, match=r"models has no xyz in it; check the path"):
        pyint8.load("models/xyz", "cpu")
    assert time.monotonic() - start < 1
    with pytest.raises(CheckpointNotFoundError, match="there is no folder models/smolm2 here, and the configuration"):
        pyint8.load("models/smolm2", "cpu", revision="main")  # said to be the hub's


@pytest.mark.parametrize("base", ["/no/such/folder", "./gone", "some-id/of-nothing"])
def test_an_adapter_without_its_base_is_named(base: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    with pytest.raises(CheckpointNotFoundError) as caught:
        pyint8.load(tmp_path, "cpu")
    assert f"The adapter {tmp_path} names it: base_model_name_or_path in its adapter_config.json" in str(caught.value)
    assert base in str(caught.value)


def test_code_of_the_checkpoints_own_asks_for_trust(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("llama", "bf16")
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "code.OwnModel", "AutoConfig": "code.OwnConfig"}
    fields |= {"architectures": ["OwnModel"], "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "code.py").write_text("raise AssertionError('it was run')\n")
    with pytest.raises(ModelNotSupportedError, match=r"brings code of its own.*pass trust_remote_code=True") as caught:
        pyint8.load(folder, "cpu")
    assert "Install a release" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "advice"),
    [("PYINT8_TREADS", "did you mean PYINT8_THREADS?"), ("PYINT8_XYZ", "there are PYINT8_THREADS, ")],
)
def test_an_unknown_variable_is_warned_of(variable: str, advice: str, caplog: pytest.LogCaptureFixture) -> None:
    StreamOptions.from_environment({variable: "4", "PYINT8_REQUIRE_GPU": "1", "PYINT8_TEST_LIBCUDA": "x", "OTHER": "1"})
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the environment variable {variable} means nothing to pyint8; {advice}")


def test_load_in_8bit_within_takeover_is_explained(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    with (
        pytest.raises(OptionError, match=r"quantization_config=BitsAndBytesConfig\(load_in_8bit=True\)"),
        pyint8.takeover(),
    ):
        tf.AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    with pytest.raises(TypeError, match="of another kind"), pyint8.takeover():
        raise TypeError("of another kind")


@pytest.mark.parametrize("call", ["load('x', skip_modules=[])", "load('./typo')", "load('x', config=1)"])
def test_light_mistakes_cost_no_imports(call: str) -> None:
    script = (
        "import sys, pyint8\n"
        f"try: pyint8.{call}\n"
        "except pyint8.Pyint8Error: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pyint8.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False False"


def test_every_error_has_a_place_to_look_at() -> None:
    error = Pyint8Error("broken")
    assert (error.path, error.tensor, error.offset) == (None, None, None)
    assert (OptionError("broken").path, str(OptionError("broken"))) == (None, "broken")
