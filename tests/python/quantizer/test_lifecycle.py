"""The verbs of the int8 lifecycle, each with its behaviour and its refusals."""

import importlib.metadata
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from small_model import INT8_LAYERS, Small, int8_modules, preprocessed
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config, errors
from pyint8.quantizer import Int8Quantizer

CPU = torch.device("cpu")


# --- validate_environment ---------------------------------------------------------------------------------------------

Versions = Callable[..., None]


def test_absent_packages_are_refused(installed: Versions) -> None:
    quantizer = Int8Quantizer(Int8Config())
    installed(accelerate=None)
    with pytest.raises(ImportError, match="int8 needs accelerate: `pip install accelerate`"):
        quantizer.validate_environment()
    installed(bitsandbytes=None)
    with pytest.raises(errors.MissingDependencyError, match="int8 needs bitsandbytes: `pip install -U bitsandbytes`"):
        quantizer.validate_environment()


def test_an_upgrade_is_seen(installed: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: what the message says to do, then the same load again."""
    quantizer = Int8Quantizer(Int8Config())
    installed(bitsandbytes="0.9.5")
    with pytest.raises(errors.DependencyVersionError):
        quantizer.validate_environment()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0.0")
    quantizer.validate_environment()


@pytest.mark.parametrize("version", ["0.37.1", "0.9.5", "0.37.2.dev0"])
def test_an_old_bitsandbytes_is_refused(version: str, installed: Versions) -> None:
    installed(bitsandbytes=version)
    with pytest.raises(
        ValueError, match=rf"bitsandbytes {version} is too old .* at least 0\.37\.2 is needed; `pip install -U"
    ) as caught:
        Int8Quantizer(Int8Config()).validate_environment()
    assert isinstance(caught.value, errors.DependencyVersionError)


@pytest.mark.parametrize("version", ["0.37.2", "0.37.10", "0.100.0"])
def test_a_newer_bitsandbytes_is_taken(version: str, installed: Versions) -> None:
    installed(bitsandbytes=version)
    Int8Quantizer(Int8Config()).validate_environment(from_tf=False, from_flax=False)


@pytest.mark.parametrize(("argument", "framework"), [("from_tf", "TensorFlow"), ("from_flax", "Flax")])
def test_foreign_weights_are_refused(argument: str, framework: str, checkpoints: CheckpointStore) -> None:
    message = f"{argument}=True: int8 models are not made from {framework} weights; convert them to PyTorch"
    with pytest.raises(errors.OptionError, match=message):
        Int8Quantizer(Int8Config()).validate_environment(**{argument: True})
    with pytest.raises(errors.OptionError, match=message):
        pyint8.load(checkpoints.folder(ZOO["llama"], "fp16"), "cpu", **{argument: True})


def test_a_machine_without_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "supported_torch_devices", {"abacus"})
    with pytest.raises(RuntimeError, match=r"quantizes on \['abacus'\], and this machine has \['cpu'") as caught:
        Int8Quantizer(Int8Config()).validate_environment()
    assert isinstance(caught.value, errors.EnvironmentNotSupportedError)


OFFLOADED = [
    ({"embed": 0, "layers.0": 0, "layers.1": "cpu", "lm_head": 0}, "the CPU beside another device"),
    ({"": 0, "layers.1.mlp": "disk"}, "the disk beside another device"),
    ({"": 0, "layers.0.mlp": "disk", "layers.1": "cpu"}, "the CPU or the disk beside another device"),
    ({"": "cuda:0", "layers": torch.device("cpu")}, "the CPU beside another device"),
    ({"": "cpu", "layers.1": "disk"}, "the CPU or the disk"),
    ({"": "disk"}, "the disk"),
]


@pytest.mark.parametrize(("device_map", "where"), OFFLOADED, ids=str)
def test_quantized_modules_off_the_device_are_refused(device_map: dict[str, Any], where: str) -> None:
    message = rf"to be quantized on {where} \(.*Int8Config\(fp32_cpu_offload=True\)"
    with pytest.raises(errors.PlacementError, match=message):
        preprocessed(Small(), device_map)
    quantizer = preprocessed(Small())
    with pytest.raises(ValueError, match=message):
        quantizer.validate_environment(device_map=device_map)


@pytest.mark.parametrize(
    "device_map",
    [
        {"embed": 0, "layers": 0, "lm_head": "cpu"},
        {"": 0, "lm_head": "disk", "embed": "cpu"},
        {"": "cpu"},
        {"embed": "cpu", "layers": CPU, "lm_head": "cpu"},
        {"": 0},
        "auto",
        None,
    ],
    ids=str,
)
def test_modules_that_are_not_converted_may_be_anywhere(device_map: Any) -> None:
    model = Small()
    preprocessed(model, device_map).validate_environment(device_map=device_map)
    assert int8_modules(model) == INT8_LAYERS


@pytest.mark.parametrize(
    ("device_map", "off"),
    [(OFFLOADED[0][0], "layers.1"), (OFFLOADED[1][0], "layers.1.mlp"), (OFFLOADED[3][0], "layers")],
    ids=str,
)
def test_offload_leaves_what_is_off_the_gpu_unconverted(device_map: dict[str, Any], off: str) -> None:
    model = Small()
    quantizer = preprocessed(model, device_map, fp32_cpu_offload=True)
    quantizer.validate_environment(device_map=device_map)
    off_gpu = {name for name in INT8_LAYERS if name.startswith(off)}
    assert off_gpu
    assert int8_modules(model) == INT8_LAYERS - off_gpu
    assert quantizer.skipped.keys() == off_gpu | {"lm_head"}


# --- before the model -------------------------------------------------------------------------------------------------


def test_adjust_max_memory_leaves_a_tenth() -> None:
    adjusted = Int8Quantizer(Int8Config()).adjust_max_memory({0: 1000, "cpu": 50})
    assert adjusted == {0: pytest.approx(900), "cpu": pytest.approx(45)}


def test_update_dtype(caplog: pytest.LogCaptureFixture) -> None:
    quantizer = Int8Quantizer(Int8Config())
    with caplog.at_level(logging.INFO, "pyint8"):
        assert quantizer.update_dtype("auto") == "auto"
        assert quantizer.update_dtype(torch.float32) is torch.float32
        assert not caplog.records
        assert quantizer.update_dtype(None) is torch.float16
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "dtype=None" in record.getMessage()
    assert "float16, what bitsandbytes computes in" in record.getMessage()


def test_update_device_map(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = Int8Quantizer(Int8Config())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "pyint8"):
        for given in ("auto", {"": 1}, "cpu"):
            assert quantizer.update_device_map(given) is given
        assert not caplog.records
        assert quantizer.update_device_map(None) == {"": "cpu"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        assert quantizer.update_device_map(None) == {"": 3}
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [text.partition(";")[0] for text in texts] == [
        "device_map was not given: the model goes to cpu",
        "device_map was not given: the model goes to 3",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8])
def test_memory_is_planned_in_int8(dtype: torch.dtype) -> None:
    assert Int8Quantizer(Int8Config()).adjust_target_dtype(dtype) is torch.int8


# --- preprocess_model -------------------------------------------------------------------------------------------------


def test_what_is_found_is_converted_on_meta() -> None:
    model = Small().eval()
    quantizer = preprocessed(model, threshold=3.5)
    assert int8_modules(model) == INT8_LAYERS
    assert quantizer.skipped == {"lm_head": "in the list of modules to skip"}
    for name in INT8_LAYERS:
        module = model.get_submodule(name)
        assert module.source_cls is (Conv1D if name.endswith("attn") else nn.Linear)
        assert tuple(module.weight.shape) == ((24, 16) if name.endswith("attn") else (40, 16))
        assert all(parameter.is_meta and not parameter.requires_grad for parameter in module.parameters())
        assert (module.state.threshold, module.state.has_fp16_weights) == (3.5, False)
        assert not module.training
        assert isinstance(quantizer.converted[name], module.source_cls)


@pytest.mark.parametrize(
    ("skip", "converted"),
    [
        ([], INT8_LAYERS | {"lm_head"}),
        (["lm_head", "layers.0"], {"layers.1.attn", "layers.1.mlp"}),
        (["mlp"], {"layers.0.attn", "layers.1.attn", "lm_head"}),
        ([r"layers\.\d\.attn", "lm_head"], {"layers.0.mlp", "layers.1.mlp"}),
        (["layers.1.m", "lm_head"], INT8_LAYERS),
    ],
    ids=lambda names: ", ".join(sorted(names)),
)
def test_a_skip_list_is_matched_as_transformers_does(skip: list[str], converted: set[str]) -> None:
    model = Small()
    quantizer = preprocessed(model, skip=skip)
    assert int8_modules(model) == converted
    assert quantizer.skipped.keys() == (INT8_LAYERS | {"lm_head"}) - converted


@pytest.mark.parametrize("has_fp16_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_modules_of_one_shape_share_nothing(bias: bool, has_fp16_weight: bool) -> None:
    """The second is a copy of the first, and what its own constructor would have made."""
    model = nn.Sequential(*(nn.Linear(16, 40, bias=bias) for _ in range(3)))
    preprocessed(model, skip=[], has_fp16_weight=has_fp16_weight)
    with torch.device("meta"):
        fresh = bnb.nn.Linear8bitLt(16, 40, bias, has_fp16_weights=has_fp16_weight, threshold=6.0)
    assert len(dict(model.named_parameters())) == 3 * (1 + bias)
    for module in model:
        assert type(module) is bnb.nn.Linear8bitLt
        assert vars(module).keys() == {*vars(fresh), "source_cls"}
        assert vars(module.state) == vars(fresh.state)
        for name, parameter in fresh.named_parameters():
            own = module.get_parameter(name)
            assert (type(own), own.shape, own.dtype, own.device.type, own.requires_grad, vars(own)) == (
                type(parameter),
                parameter.shape,
                parameter.dtype,
                "meta",
                False,
                vars(parameter),
            )
    for name, value in vars(model[0]).items():
        others = [vars(module)[name] for module in model[1:]]
        if isinstance(value, (dict, set)) or name == "state":
            assert all(value is not other for other in others)
            assert [type(other) for other in others] == [type(value)] * 2
    model[1].register_forward_hook(lambda *_: None)
    assert not model[0]._forward_hooks
    assert not model[2]._forward_hooks


def test_nothing_to_convert_is_said(caplog: pytest.LogCaptureFixture) -> None:
    preprocessed(nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3)))
    assert "nothing in this Sequential is quantized" in caplog.text


def test_transformers_lists_are_honoured(checkpoints: CheckpointStore) -> None:
    """T5's `wo` is kept in float32 at float16, its head is tied; the config says what was done."""
    model, report = pyint8.load(checkpoints.folder(ZOO["t5"], "fp32"), "cpu", return_report=True)
    kept = {name for name, _ in model.named_modules() if name.endswith(".wo")}
    assert kept
    assert report.skipped == {
        **dict.fromkeys(kept, "in its class's list of modules to keep in float32"),
        "lm_head": "in the list of modules to skip",
        "shared": "an embedding",
    }
    assert {model.get_submodule(name).weight.dtype for name in kept} == {torch.float32}
    assert type(model.config.quantization_config) is BitsAndBytesConfig
    assert model.config.quantization_config.load_in_8bit


def test_an_absent_bitsandbytes_is_told_before_it_is_imported(tmp_path: Path) -> None:
    """In a process of its own, whose bitsandbytes cannot be found."""
    program = (
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'bitsandbytes':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "sys.modules['bitsandbytes'] = None\n"
        "import pyint8\n"
        "pyint8.load(sys.argv[1])\n"
    )
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd="/", capture_output=True, text=True)
    assert "MissingDependencyError: loading in int8 needs bitsandbytes: `pip install -U bitsandbytes`" in done.stderr
