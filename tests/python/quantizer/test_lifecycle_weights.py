"""The int8 lifecycle: which modules are linear, what becomes of a weight, and what a finished model says of itself."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config
from pyint8.errors import NonFiniteWeightError, QuantizationStateError
from pyint8.quantizer import Int8Quantizer, TensorSource, WeightHealth
from pyint8.quantizer.modules import why_not_linear

CPU = torch.device("cpu")
COMPUTES_MORE = "computes more than a Linear does"


class Spelled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.in_features**-0.5 * super().forward(input)


class Widening(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)[..., None]


class WithParameter(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(1))


class WithBuffer(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(1))


class WithChild(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.act = nn.ReLU()


class Demanding(nn.Linear):
    def forward(self, input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input) * mask


class Raising(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise KeyError("not on these numbers")


class Tupled(nn.Linear):
    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Spelled, FalconLinear])
def test_linears_in_disguise_are_linear(kind: type[nn.Linear], bias: bool) -> None:
    assert why_not_linear(kind(7, 11, bias)) is None
    with torch.device("meta"):  # as transformers builds models
        module = kind(7, 11, bias, dtype=torch.float16)
        assert why_not_linear(module) is None
    assert (module.in_features, module.out_features) == (7, 11)
    assert module.weight.is_meta
    assert tuple(module.weight.shape) == (11, 7)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_linears_in_disguise_are_found_under_any_default_dtype(default: torch.dtype) -> None:
    module = Spelled(7, 11)
    torch.set_default_dtype(default)
    try:
        assert why_not_linear(module) is None
        assert why_not_linear(Scaling(7, 11)) is not None
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [Scaling, Widening, WithParameter, WithBuffer, WithChild, Demanding, Raising, Tupled])
def test_subclasses_that_do_more_are_not_linear(kind: type[nn.Linear]) -> None:
    assert why_not_linear(kind(7, 11, True)) == f"{kind.__name__} {COMPUTES_MORE}"


def test_other_modules_with_a_linear_in_them() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert why_not_linear(attention.out_proj) == "its weight is used without calling the module"
    assert COMPUTES_MORE in str(why_not_linear(parametrizations.weight_norm(nn.Linear(3, 4))))
    assert why_not_linear(Conv1D(3, 4)) is None
    assert why_not_linear(nn.Embedding(3, 4)) == "not a Linear"
    model = nn.Sequential(attention, Scaling(8, 8), nn.Linear(8, 8))
    quantizer = Int8Quantizer(Int8Config())
    quantizer.preprocess_model(model, skip=[], device_map=None)
    assert quantizer.converted.keys() == {"2"}
    assert quantizer.skipped.keys() == {"0.out_proj", "1"}


# --- check_quantized_param, create_quantized_param --------------------------------------------------------------------


def converted(*, pre_quantized: bool = False, **fields: Any) -> Int8Quantizer:
    """A quantizer whose model has a Linear "linear" and a Conv1D "conv"; both take [*, 12] to [*, 20]."""
    quantizer = Int8Quantizer(Int8Config(**fields), pre_quantized=pre_quantized)
    model = nn.ModuleDict({"linear": nn.Linear(12, 20), "conv": Conv1D(20, 12), "norm": nn.LayerNorm(20)})
    quantizer.preprocess_model(model, skip=[], device_map=None)
    weights = {name: f"{name}.weight" for name in ("linear", "conv")}
    shapes = {key: quantizer.expected_shape(name, model.get_parameter(name).shape) for key, name in weights.items()}
    assert shapes == {"linear": (20, 12), "conv": (20, 12) if pre_quantized else (12, 20)}
    return quantizer


def weight_of(*shape: int) -> torch.Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 30
    return weight


def test_only_weights_of_converted_modules_are_quantized() -> None:
    quantizer = converted()
    names = ["linear.weight", "conv.weight", "linear.bias", "norm.weight", "linear", "weight", "other.weight"]
    assert [name for name in names if quantizer.check_quantized_param(name)] == ["linear.weight", "conv.weight"]


@pytest.mark.parametrize("model_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear.weight", "conv.weight"])
def test_a_weight_becomes_what_bitsandbytes_makes_of_it(name: str, model_dtype: torch.dtype) -> None:
    stored = weight_of(12, 20) if name == "conv.weight" else weight_of(20, 12)
    before = stored.clone()
    made = converted().create_quantized_param(name, TensorSource(stored), model_dtype=model_dtype, device=CPU)
    transposed = stored.T.contiguous() if name == "conv.weight" else stored
    expected = bnb.nn.Int8Params(transposed.to(model_dtype), requires_grad=False).to("cpu")
    assert type(made) is bnb.nn.Int8Params
    assert torch.equal(made.data, expected.data)
    assert torch.equal(made.SCB, expected.SCB)
    assert made.CB.data_ptr() == made.data_ptr()
    assert (made.has_fp16_weights, made.requires_grad) == (False, False)
    assert torch.equal(stored, before)


@pytest.mark.parametrize("name", ["linear.weight", "conv.weight"])
def test_pre_quantized_weights_are_taken_as_they_are(name: str) -> None:
    codes = torch.arange(240).reshape(20, 12).to(torch.int8)
    scales = torch.rand(20)
    made = converted(pre_quantized=True).create_quantized_param(
        name, TensorSource(codes), scales=scales, model_dtype=torch.float16, device=CPU
    )
    assert type(made) is bnb.nn.Int8Params
    assert torch.equal(made.data, codes)
    assert torch.equal(made.SCB, scales)
    assert made.CB.data_ptr() == made.data_ptr()


def test_pre_quantized_weights_need_their_scales_and_int8() -> None:
    quantizer = converted(pre_quantized=True)
    codes = torch.zeros(20, 12, dtype=torch.int8)
    with pytest.raises(QuantizationStateError, match=r"'linear.weight': an int8 weight without its scales") as caught:
        quantizer.create_quantized_param("linear.weight", TensorSource(codes), model_dtype=torch.float16, device=CPU)
    assert caught.value.tensor == "linear.weight"
    for wrong in (torch.uint8, torch.float16):
        with pytest.raises(ValueError, match=rf"weight of dtype {wrong}, which must be int8"):
            quantizer.create_quantized_param(
                "linear.weight",
                TensorSource(codes.to(wrong)),
                scales=torch.ones(20),
                model_dtype=torch.float16,
                device=CPU,
            )


def test_sixteen_bit_weights_stay_so() -> None:
    quantizer = converted(has_fp16_weight=True)
    stored = weight_of(12, 20)
    made = quantizer.create_quantized_param("conv.weight", TensorSource(stored), model_dtype=torch.bfloat16, device=CPU)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.data, stored.T.to(torch.bfloat16))
    assert isinstance(made, bnb.nn.Int8Params)
    assert made.has_fp16_weights


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scales_are_attached_and_not_unexpected(name: str, checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO[name], PREQUANTIZED)
    model, report = pyint8.load(folder, "cpu", return_report=True)
    assert not any(report.loading_info.values())
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        scales = {key: file.get_tensor(key) for key in file.keys() if key.endswith(".SCB")}  # noqa: SIM118
    assert scales
    for key, value in scales.items():
        assert torch.equal(model.get_parameter(key.removesuffix("SCB") + "weight").SCB, value)


# --- postprocess_model, is_serializable, is_trainable -----------------------------------------------------------------


def test_a_finished_model_says_what_it_is(installed: Callable[..., None]) -> None:
    for version, serializable in (("0.37.2", False), ("0.37.3", True), ("0.100.0", True)):
        installed(bitsandbytes=version)
        model = nn.Sequential(nn.Linear(2, 2))
        Int8Quantizer(Int8Config()).postprocess_model(model)
        assert (model.is_loaded_in_8bit, model.is_8bit_serializable) == (True, serializable)


@pytest.mark.parametrize(("version", "trainable"), [("0.36.9", False), ("0.37.0", True), ("0.100.0", True)])
def test_is_trainable_by_version(version: str, trainable: bool, installed: Callable[..., None]) -> None:
    installed(bitsandbytes=version)
    assert Int8Quantizer(Int8Config()).is_trainable is trainable


def test_a_loaded_model_says_what_it_is(checkpoints: CheckpointStore) -> None:
    model = pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu")
    assert model.is_loaded_in_8bit is True
    assert model.is_8bit_serializable is True
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 7e4])
def test_bad_weights_are_settled_at_the_end(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    weight = weight_of(20, 12)
    weight[7, 3] = bad
    for strict in (True, False):
        quantizer = converted()
        quantizer.strict = strict
        quantizer.create_quantized_param("linear.weight", TensorSource(weight), model_dtype=torch.float32, device=CPU)
        if strict:
            with pytest.raises(
                NonFiniteWeightError, match=r"tensor 'linear.weight': row 7 has NaN, infinity"
            ) as caught:
                quantizer.postprocess_model(nn.Identity())
            assert caught.value.tensor == "linear.weight"
    with caplog.at_level(logging.WARNING, "pyint8"):
        quantizer.postprocess_model(nn.Identity())
        quantizer.postprocess_model(nn.Identity())
    (record,) = caplog.records
    assert "linear.weight (row 7)" in record.getMessage()


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, where bitsandbytes' kernel swallows NaN."""

    is_cuda = True  # type: ignore[assignment]


def test_nan_that_a_kernel_swallows_is_seen_all_the_same() -> None:
    health = WeightHealth()
    half = torch.ones(3, 4, dtype=torch.float16)
    half[1, 2] = torch.nan
    health.watch("x.weight", 10, half.as_subclass(OnGpu), torch.ones(3))
    (bad,) = health.bad_weights()
    assert (bad.name, bad.row) == ("x.weight", 11)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), ()], ids=str)
def test_an_empty_tensor_on_a_gpu_is_healthy(shape: tuple[int, ...]) -> None:
    health = WeightHealth()
    before = torch.zeros(shape).as_subclass(OnGpu)
    health.watch_cast("x", before.half(), [before.dtype], list)
    assert health.bad_weights() == []


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 600_000), (1100, 1000), (2048, 513)], ids=str)
def test_a_weight_quantized_in_pieces_equals_the_whole(tmp_path, shape, transposed):
    """On the CPU pieces of half a million elements are quantized at a time; one row may be longer than that."""
    from safetensors.torch import save_file

    from pyint8.checkpoint import open_checkpoint
    from pyint8.config import StreamOptions
    from pyint8.quantizer import weights
    from pyint8.streaming.reading import open_stream
    from pyint8.streaming.requests import TensorRequest
    from pyint8.streaming.source import StreamSource

    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(*shape, generator=generator).bfloat16() for name in ("a", "b")}
    save_file(
        {name: tensor.T.contiguous() if transposed else tensor for name, tensor in tensors.items()},
        tmp_path / "m.safetensors",
    )
    checkpoint = open_checkpoint(str(tmp_path / "m.safetensors"))
    with open_stream([TensorRequest(checkpoint[name], CPU, True) for name in tensors], StreamOptions()) as stream:
        made = {
            name: weights.quantize(
                StreamSource(stream, checkpoint[name]),
                transposed=transposed,
                model_dtype=torch.bfloat16,
                device=CPU,
                name=name,
                health=WeightHealth(),
            )
            for name in tensors
        }
    for name, tensor in tensors.items():
        expected = bnb.nn.Int8Params(tensor, requires_grad=False).to("cpu")
        assert torch.equal(made[name].data, expected.data)
        assert torch.equal(made[name].SCB, expected.SCB)
        assert made[name].CB.data_ptr() == made[name].data_ptr()
