"""Experts in int8, of every architecture that transformers keeps them fused in: codes, scales, outputs, and no more."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import MODEL_TYPES, NotBuiltError, build
from oracle import state
from safetensors.torch import load_file, save_file
from zoo import ZOO, CheckpointStore, randomise

import pyint8
from pyint8.errors import ModelNotSupportedError, OptionError
from pyint8.operations.cached import wait_for_fills
from pyint8.quantizer import EXPERT_SCALES
from pyint8.quantizer.experts.modules import WEIGHTS, Int8Experts, why_not_experts

KWARGS: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}
LEAST_COMPARED = 50

compared: set[str] = set()


def small_mixture(model_type: str) -> Any:
    try:
        model = build(model_type)
    except NotBuiltError as error:
        pytest.skip(str(error).splitlines()[0])
    if "xperts" not in inspect.getsource(inspect.getmodule(type(model)) or pytest):
        pytest.skip("no experts")
    if not any(why_not_experts(module) is None for module in model.modules()):
        pytest.skip("no fused experts")
    return randomise(model, model_type, outliers=False).to(torch.bfloat16)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_codes_and_scales_are_those_of_linear8bitlt(model_type: str, tmp_path: Path) -> None:
    model = small_mixture(model_type)
    model.save_pretrained(tmp_path)
    usual = pyint8.load(tmp_path, model=type(model), progress=False, **KWARGS)
    config = pyint8.Int8Config(experts=True)
    ours, report = pyint8.load(tmp_path, model=type(model), config=config, progress=False, return_report=True, **KWARGS)
    assert not report.loading_info["missing_keys"]
    checked = 0
    for name, module in ours.named_modules():
        if isinstance(module, Int8Experts):
            checked += compare(module, usual.get_submodule(name))
    assert checked
    compared.add(model_type)
    for name, parameter in usual.named_parameters():  # all else is as it was
        if name.rpartition(".")[2] not in WEIGHTS:
            assert torch.equal(parameter, ours.get_parameter(name)), name
    pyint8.save(ours, tmp_path / "int8")
    again = pyint8.load(tmp_path / "int8", model=type(model), progress=False, **KWARGS)
    assert state(again) == state(ours)
    assert [type(module) for module in again.modules()] == [type(module) for module in ours.modules()]


def compare(ours: Any, theirs: Any) -> int:
    checked = 0
    for name in WEIGHTS:
        weight = theirs._parameters.get(name)
        if weight is None:
            continue
        for expert, one in enumerate(weight.transpose(1, 2) if theirs.is_transposed else weight):
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(one.contiguous().half())
            assert torch.equal(codes, getattr(ours, name)[expert])
            assert torch.equal(scales, getattr(ours, name + EXPERT_SCALES)[expert])
            checked += 1
    return checked


def test_many_were_compared() -> None:
    assert len(compared) >= LEAST_COMPARED


# --- an ordinary model otherwise --------------------------------------------------------------------------------------


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def mixture(request: pytest.FixtureRequest, checkpoints: CheckpointStore) -> tuple[Any, Any]:
    """A model with int8 experts, and with 16-bit ones."""
    folder = checkpoints.folder(ZOO[request.param], "bf16")
    config = pyint8.Int8Config(experts=True)
    ours, theirs = (pyint8.load(folder, "cpu", config=each, dtype=torch.float32) for each in (config, None))
    return ours, theirs


TOKENS = torch.arange(2, 26).view(2, 12)


def test_outputs_are_near_those_of_16_bit(mixture: tuple[Any, Any]) -> None:
    with torch.no_grad():
        ours, theirs = (model(TOKENS).logits for model in mixture)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False}], ids=str)
def test_generation(mixture: tuple[Any, Any], how: dict[str, Any]) -> None:
    assert mixture[0].generate(TOKENS, max_new_tokens=4, min_new_tokens=4, **how).shape == (2, 16)


def test_copies(mixture: tuple[Any, Any]) -> None:
    model = mixture[0]
    with torch.no_grad():
        expected = model(TOKENS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(TOKENS).logits, expected)


def test_any_experts_implementation_is_ours(mixture: tuple[Any, Any]) -> None:
    model = mixture[0]
    with torch.no_grad():
        expected = model(TOKENS).logits
        for name in ("eager", "grouped_mm", "batched_mm"):
            model.set_experts_implementation(name)
            assert torch.equal(model(TOKENS).logits, expected)


def test_attention_trains(mixture: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mixture[0], peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)


def test_target_parameters_are_refused(mixture: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(mixture[0], config)
    with pytest.raises(ModelNotSupportedError, match="target_parameters cannot name them"):
        model(TOKENS, labels=TOKENS)


def test_they_stay_int8_when_the_model_is_cast(mixture: tuple[Any, Any]) -> None:
    for module in mixture[0].modules():
        if isinstance(module, Int8Experts):
            module.to(torch.bfloat16)
            assert {value.dtype for name, value in module.state_dict().items() if "_bias" not in name} == {
                torch.int8,
                torch.float32,
            }


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


@pytest.mark.parametrize("by", ["save", "save_pretrained"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_stock_transformers_refuses_them(checkpoints: CheckpointStore, tmp_path: Path, name: str, by: str) -> None:
    config = pyint8.Int8Config(experts=True)
    model = pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", config=config)
    if by == "save":
        pyint8.save(model, tmp_path)
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
