"""Experts in int8 by other roads: drop-in, cache, save, convert, reload, verify; and checkpoints that are not sound."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from oracle import state
from safetensors.torch import load_file, save_file
from zoo import ZOO, CheckpointStore, randomise

import pyint8
from pyint8.errors import (
    CheckpointError,
    ModelNotSupportedError,
    NonFiniteWeightError,
    OptionError,
    QuantizationStateError,
)
from pyint8.operations.cached import wait_for_fills
from pyint8.quantizer.experts.modules import Int8Experts

pytestmark = pytest.mark.slow

TOKENS = torch.arange(2, 26).view(2, 12)


# --- by other ways ----------------------------------------------------------------------------------------------------


def is_int8(model: Any) -> bool:
    return any(isinstance(module, Int8Experts) for module in model.modules())


def test_drop_in(checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints.folder(ZOO["mixtral"], "bf16")

    def loaded(config: Any) -> Any:
        return tf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=config)

    assert is_int8(loaded(pyint8.Int8Config(experts=True)))
    assert not is_int8(loaded(pyint8.Int8Config()))
    usual = tf.BitsAndBytesConfig(load_in_8bit=True)
    with pyint8.takeover():
        assert not is_int8(loaded(usual))
        monkeypatch.setenv("PYINT8_EXPERTS", "1")
        assert is_int8(loaded(usual))
        monkeypatch.setenv("PYINT8_EXPERTS", "many")
        with pytest.raises(OptionError, match="PYINT8_EXPERTS is 'many'; it must be 0 or 1"):
            loaded(usual)


def test_experts_that_are_skipped(checkpoints: CheckpointStore) -> None:
    config = pyint8.Int8Config(experts=True, skip_modules=["lm_head", "model.layers.0.mlp.experts"])
    model, report = pyint8.load(checkpoints.folder(ZOO["mixtral"], "bf16"), "cpu", config=config, return_report=True)
    found = [isinstance(layer.mlp.experts, Int8Experts) for layer in model.model.layers]
    assert found == [False] + [True] * (len(found) - 1)
    assert report.skipped["model.layers.0.mlp.experts"] == "in the list of modules to skip"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_convert_is_load_and_save(checkpoints: CheckpointStore, tmp_path: Path, name: str) -> None:
    source, config = checkpoints.folder(ZOO[name], "bf16"), pyint8.Int8Config(experts=True)
    pyint8.convert(source, tmp_path / "converted", device="cpu", config=config, dtype=torch.bfloat16, progress=False)
    pyint8.save(pyint8.load(source, "cpu", config=config, dtype=torch.bfloat16), tmp_path / "saved")
    files = [path.name for path in (tmp_path / "saved").iterdir()]
    assert sorted(files) == sorted(path.name for path in (tmp_path / "converted").iterdir())
    for file in files:
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "converted" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_cache_keeps_them(checkpoints: CheckpointStore, tmp_path: Path, name: str) -> None:
    folder = checkpoints.folder(ZOO[name], "bf16")

    def load(**options: Any) -> tuple[Any, bool]:
        model, report = pyint8.load(folder, "cpu", cache=tmp_path, return_report=True, **options)
        assert wait_for_fills(60)
        return model, report.from_cache

    config = pyint8.Int8Config(experts=True)
    first, from_cache = load(config=config)
    assert not from_cache
    assert not is_int8(load()[0])
    second, from_cache = load(config=config)
    assert from_cache
    assert state(second) == state(first)


# --- without pyint8 ---------------------------------------------------------------------------------------------------

STOCK = """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
except ValueError as error:
    sys.exit(0 if 'experts_implementation="pyint8-1"` is not supported' in str(error) else f"another error: {error}")
sys.exit("it was loaded")
"""


@pytest.mark.parametrize(
    ("name", "by"), [("mixtral", "save"), ("mixtral", "fused"), ("qwen3_moe", "fused"), ("gpt_oss", "save_pretrained")]
)
def test_stock_transformers_refuses_them(checkpoints: CheckpointStore, tmp_path: Path, name: str, by: str) -> None:
    config = pyint8.Int8Config(experts=True)
    model = pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", config=config)
    if by != "save_pretrained":
        pyint8.save(model, tmp_path, fused_experts=by == "fused")
    else:
        model.save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", STOCK, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert state(pyint8.load(tmp_path, "cpu")) == state(model)
    with pytest.raises((ModelNotSupportedError, RuntimeError), match=r"has taken their codes|mismatched_sizes"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")(TOKENS)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_routers_that_transformers_4_quantized(checkpoints: CheckpointStore, tmp_path: Path, name: str) -> None:
    config = pyint8.Int8Config(experts=True)
    model = pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", config=config, dtype=torch.bfloat16)
    pyint8.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    routers = [key for key in tensors if key.endswith(".gate.weight")]
    assert routers
    wanted = {}
    for key in routers:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(tensors[key].half())
        wanted[key] = (codes * scales.unsqueeze(-1) / 127).to(torch.bfloat16)
        own = key.removesuffix("weight")
        tensors |= {key: codes, f"{own}SCB": scales, f"{own}weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again, report = pyint8.load(tmp_path, "cpu", return_report=True)
    assert report.tensors["dequantized"] == len(routers)
    assert not report.loading_info["unexpected_keys"]
    found = {key: value for key, value in again.state_dict().items() if key.endswith("mlp.gate.weight")}
    assert len(found) == len(routers)
    for (_, value), expected in zip(sorted(found.items()), (wanted[key] for key in sorted(wanted)), strict=True):
        assert torch.equal(value, expected)


# --- what a checkpoint must have --------------------------------------------------------------------------------------


def test_some_experts_may_stay_16_bit(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    config = pyint8.Int8Config(experts=True, skip_modules=["lm_head", "model.layers.0.mlp.experts"])
    model = pyint8.load(checkpoints.folder(ZOO["mixtral"], "bf16"), "cpu", config=config, dtype=torch.float32)
    pyint8.save(model, tmp_path)
    again = pyint8.load(tmp_path, "cpu", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_the_variable_is_not_for_int8_checkpoints(
    checkpoints: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pyint8.load(checkpoints.folder(ZOO["gpt_oss"], "bf16"), "cpu")
    pyint8.save(model, tmp_path)
    monkeypatch.setenv("PYINT8_EXPERTS", "1")
    assert state(pyint8.load(tmp_path, "cpu")) == state(model)


@pytest.mark.parametrize(
    ("name", "tensor", "change", "words"),
    [
        ("mixtral", "experts.3.w3.SCB", None, "without its scales"),
        ("mixtral", "experts.3.w3.SCB", lambda scales: scales[:-1], "they must be F32"),
        ("mixtral", "experts.3.w3.weight", lambda codes: codes.bfloat16(), "it is BF16, and other experts"),
        ("gpt_oss", "experts.gate_up_proj_SCB", None, "without its scales"),
        ("gpt_oss", "experts.gate_up_proj_SCB", lambda scales: scales[:, :-1].clone(), "must be F32"),
        ("gpt_oss", "experts.down_proj", lambda codes: codes.bfloat16(), "it is BF16, and other experts"),
    ],
)
def test_codes_and_scales_must_be_sound(
    checkpoints: CheckpointStore, tmp_path: Path, name: str, tensor: str, change: Any, words: str
) -> None:
    config = pyint8.Int8Config(experts=True)
    pyint8.save(pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", config=config), tmp_path)
    assert pyint8.verify(tmp_path).is_sound
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if key.endswith(tensor))
    value = tensors.pop(key)
    if change is not None:
        tensors[key] = change(value)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizationStateError, match=words):
        pyint8.load(tmp_path, "cpu")


@pytest.mark.parametrize(("name", "tensor"), [("mixtral", "experts.3.w3.SCB"), ("gpt_oss", "experts.gate_up_proj_SCB")])
def test_scales_must_be_finite(checkpoints: CheckpointStore, tmp_path: Path, name: str, tensor: str) -> None:
    config = pyint8.Int8Config(experts=True)
    pyint8.save(pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", config=config), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if key.endswith(tensor))
    tensors[key].view(-1)[1] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeightError):
        pyint8.load(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("name", "tensor", "element"), [("mixtral", "experts.3.w3.weight", None), ("gpt_oss", "experts.down_proj", 2)]
)
def test_a_bad_value_is_found_where_it_is(
    checkpoints: CheckpointStore, tmp_path: Path, name: str, tensor: str, element: int | None
) -> None:
    folder = shutil.copytree(checkpoints.folder(ZOO[name], "bf16"), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(tensor))
    (tensors[key] if element is None else tensors[key][element])[5, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeightError) as caught:
        pyint8.load(folder, "cpu", config=pyint8.Int8Config(experts=True))
    assert caught.value.tensor == (key if element is None else f"{key}[{element}]")
    assert caught.value.path == str(folder / "model.safetensors")
    assert f"row {5 if element is None else 7}" in str(caught.value)  # gpt-oss stores [in, out]


def test_missing_experts_are_refused(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints.folder(ZOO["mixtral"], "bf16"), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.1." not in key or ".w2." not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"it has no model.layers.1.mlp.experts.down_proj"):
        pyint8.load(folder, "cpu", config=pyint8.Int8Config(experts=True))


def test_save_pretrained_keeps_codes_as_they_are(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    config = pyint8.Int8Config(experts=True)
    model = pyint8.load(checkpoints.folder(ZOO["mixtral"], "bf16"), "cpu", config=config)
    model.model.layers[0].mlp.experts.down_proj.data[1, 3] //= 2  # no code of this row is 127
    model.save_pretrained(tmp_path)
    assert state(pyint8.load(tmp_path, "cpu")) == state(model)
    assert pyint8.verify(tmp_path).is_sound


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_verified_against_the_source(checkpoints: CheckpointStore, tmp_path: Path, name: str) -> None:
    source = checkpoints.folder(ZOO[name], "bf16")
    config = pyint8.Int8Config(experts=True)
    pyint8.convert(source, tmp_path / "int8", device="cpu", config=config, progress=False)
    assert pyint8.verify(tmp_path / "int8", against=source).findings == ()


def test_only_experts_may_be_int8(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    config = pyint8.Int8Config(experts=True, skip_modules=["lm_head", "q_proj", "k_proj", "v_proj", "o_proj"])
    model = pyint8.load(checkpoints.folder(ZOO["mixtral"], "bf16"), "cpu", config=config)
    pyint8.save(model, tmp_path)
    assert state(pyint8.load(tmp_path, "cpu")) == state(model)


def test_what_cannot_hold_together_is_refused(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["mixtral"], "bf16")
    with pytest.raises(OptionError, match="has_fp16_weight keeps weights in 16 bit"):
        pyint8.load(folder, "cpu", config=pyint8.Int8Config(experts=True, has_fp16_weight=True))
    with pytest.raises(OptionError, match="experts=True is for transformers models"):
        pyint8.load(folder, "cpu", model=torch.nn.Linear(2, 2), config=pyint8.Int8Config(experts=True))


# --- into the memory of a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["16 bit", "int8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_reload(checkpoints: CheckpointStore, tmp_path: Path, name: str, kind: str) -> None:
    config = pyint8.Int8Config(experts=True)
    old = checkpoints.folder(ZOO[name], "bf16")
    other = tf.AutoModelForCausalLM.from_pretrained(old, dtype=torch.bfloat16)
    randomise(other, "another").save_pretrained(tmp_path / "new")
    model, wanted = (pyint8.load(path, "cpu", config=config, dtype=torch.bfloat16) for path in (old, tmp_path / "new"))
    if kind == "int8":
        pyint8.save(wanted, tmp_path / "int8")
    with torch.no_grad():
        before = model(TOKENS).logits
    memory = addresses(model)
    pyint8.reload(model, tmp_path / ("int8" if kind == "int8" else "new"), progress=False)
    assert state(model) == state(wanted)
    assert addresses(model) == memory
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, wanted(TOKENS).logits)
        assert not torch.equal(model(TOKENS).logits, before)


def addresses(model: Any) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def test_what_they_will_take_is_foretold(checkpoints: CheckpointStore) -> None:
    folder, config = checkpoints.folder(ZOO["mixtral"], "bf16"), pyint8.Int8Config(experts=True)
    model = pyint8.load(folder, "cpu", config=config, dtype=torch.bfloat16)
    size = sum(value.nbytes for value in model.state_dict().values())
    foretold = pyint8.inspect(folder, config=config, dtype=torch.bfloat16)
    assert size - 64 < foretold.int8_nbytes <= size
    assert foretold.int8_nbytes < pyint8.inspect(folder, dtype=torch.bfloat16).int8_nbytes
