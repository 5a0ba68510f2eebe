"""Experts in int8 on a GPU: kernels beside plain torch, loads beside bitsandbytes, graphs, compilation, gradients."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from guessing import LOST, begun
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from zoo import ZOO, CheckpointStore, randomise

import pyint8
from pyint8.quantizer import EXPERT_SCALES
from pyint8.quantizer.experts import linear as plain
from pyint8.quantizer.experts.modules import Int8Experts, make_int8
from pyint8.quantizer.experts.names import WEIGHTS
from pyint8.streaming import first_tensors

__all__ = ["begun"]  # a fixture

kernels: Any = pytest.importorskip("pyint8.quantizer.experts.kernels", exc_type=ImportError)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Experts, hidden, inner: even and odd ones, and more experts than a power of two.
SHAPES = [(8, 256, 384), (5, 72, 40), (70, 128, 64)]


def random_experts(experts: int, hidden: int, inner: int) -> list[torch.Tensor]:
    """Codes and scales of both layers."""
    generator = torch.Generator("cuda").manual_seed(experts * hidden)
    made = []
    for out, into in ((2 * inner, hidden), (hidden, inner)):
        made.append(
            torch.randint(-127, 128, (experts, out, into), dtype=torch.int8, device="cuda", generator=generator)
        )
        made.append(torch.rand(experts, out, device="cuda", generator=generator) / into**0.5)
    return made


def routed(tokens: int, k: int, experts: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Activations, the experts of each token, some of which are none, and their weights."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator).to(dtype)
    ids = torch.rand(tokens, experts + 1, device="cuda", generator=generator).topk(k).indices
    return [x, ids, torch.rand(tokens, k, device="cuda", generator=generator).to(dtype)]


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    assert error <= {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 2500])
def test_forward(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weights, routing = random_experts(*shape), routed(tokens, 2, shape[0], shape[1], dtype)
    expected = plain._forward_one_by_one(routing[0].double(), routing[1], routing[2].double(), *weights)
    assert_near(plain.experts_forward(*routing, *weights), expected, dtype)


def test_no_tokens() -> None:
    weights, routing = random_experts(*SHAPES[0]), routed(0, 2, SHAPES[0][0], SHAPES[0][1], torch.float16)
    assert plain.experts_forward(*routing, *weights).shape == (0, SHAPES[0][1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("tokens", [40, 2500])
def test_a_gpu_that_is_not_the_current_one(tokens: int) -> None:
    """As where a map spreads layers over several."""
    weights, routing = random_experts(*SHAPES[0]), routed(tokens, 2, SHAPES[0][0], SHAPES[0][1], torch.bfloat16)
    expected = plain.experts_forward(*routing, *weights)
    assert torch.cuda.current_device() == 0
    found = plain.experts_forward(*(each.to("cuda:1") for each in (*routing, *weights)))
    assert found.device.index == 1
    assert_near(found.cpu(), expected.cpu(), torch.bfloat16)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("pairs", [1, 31, 4096, 20000])
def test_pairs_are_sorted(pairs: int) -> None:
    ids = torch.randint(0, 12, (pairs,), device="cuda")
    pairs_in_order, *others = plain.sort_pairs(ids, 10)
    for found, expected in zip(kernels.order(ids, 2, 10), (pairs_in_order // 2, *others), strict=True):
        assert torch.equal(found.long(), expected.long())


@pytest.mark.parametrize("is_left", [False, True])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_any_cut_gives_the_same(rows: int, is_left: bool) -> None:
    codes, scales, *_ = random_experts(*SHAPES[0])
    ends = torch.tensor([0, 3, 3, 90, 91, 200, 200, 230], dtype=torch.int32, device="cuda")
    x = torch.randn(240, SHAPES[0][1], device="cuda", dtype=torch.bfloat16)
    tiles = kernels.Tiles(rows, 64, 64, 4, 3, 2, is_left)
    found = kernels.linear(x, codes, scales, ends, tiles=tiles)
    assert_near(found, plain._one_by_one(x.double(), codes, scales, ends), torch.bfloat16)
    assert not found[230:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    codes, scales, *_ = random_experts(*SHAPES[1])
    ends = torch.tensor([4, 4, 9, 30, 33], dtype=torch.int32, device="cuda")
    x = torch.randn(33, SHAPES[1][1], device="cuda").to(dtype).requires_grad_()
    y = plain.experts_linear(x, codes, scales, ends)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert_near(x.grad, plain._one_by_one_backward(grad.double(), codes, scales, ends), dtype)


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def experts() -> Any:
    config = Qwen3MoeConfig(hidden_size=128, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4)
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    make_int8(module)
    module.to_empty(device="cuda")
    up_codes, up_scales, down_codes, down_scales = random_experts(16, 128, 64)
    module.gate_up_proj.data, module.down_proj.data = up_codes, down_codes
    module.gate_up_proj_SCB, module.down_proj_SCB = up_scales, down_scales
    return module


ROUTING = (4, 16, 128, torch.bfloat16)


def test_nothing_waits_for_the_device(experts: Any) -> None:
    routing = routed(24, *ROUTING)
    experts(*routing)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(*routing)
        x = routing[0].detach().requires_grad_()
        experts(x, *routing[1:]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_other_routes(experts: Any) -> None:
    routing, other = routed(24, *ROUTING), routed(24, *ROUTING)
    other[1] = (other[1] + 3) % 16
    experts(*routing)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = experts(*routing)
    for one, value in zip(routing, other, strict=True):
        one.copy_(value)
    graph.replay()
    assert torch.equal(found, experts(*other))


def test_it_compiles_whole(experts: Any) -> None:
    routing = routed(24, *ROUTING)
    compiled = torch.compile(experts, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*routing), experts(*routing))


def test_a_gradient_takes_the_same_way(experts: Any) -> None:
    x, ids, weights = routed(24, 4, 16, 128, torch.float32)
    x.requires_grad_()
    weights.requires_grad_()
    found = experts(x, ids, weights)
    with torch.no_grad():
        assert_near(found, experts(x, ids, weights), torch.float32)
    found.square().sum().backward()
    assert x.grad.abs().max() > 0
    assert weights.grad.abs().max() > 0


# --- loads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_codes_are_bitsandbytes_own(checkpoints: CheckpointStore, name: str) -> None:
    folder = checkpoints.folder(ZOO[name], "bf16")
    ours, report = pyint8.load(
        folder, 0, config=pyint8.Int8Config(experts=True), dtype=torch.bfloat16, return_report=True
    )
    usual = pyint8.load(folder, 0, dtype=torch.bfloat16)
    assert report.tensors["int8 experts"]
    for path, module in ours.named_modules():
        if not isinstance(module, Int8Experts):
            continue
        theirs = usual.get_submodule(path)
        for weight in WEIGHTS:
            whole = theirs._parameters.get(weight)
            for expert in range(0 if whole is None else len(whole)):
                one = whole[expert].t() if theirs.is_transposed else whole[expert]
                codes, scales, _ = bnb.functional.int8_vectorwise_quant(one.contiguous().half())
                assert torch.equal(getattr(module, weight)[expert], codes)
                assert torch.equal(getattr(module, weight + EXPERT_SCALES)[expert], scales)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_converted_and_reloaded(checkpoints: CheckpointStore, tmp_path: Any, name: str) -> None:
    """A few tensors at a time, which are waited for; gpt-oss has the experts of a layer in one tensor."""
    source, config = checkpoints.folder(ZOO[name], "bf16"), pyint8.Int8Config(experts=True)
    model = pyint8.load(source, 0, config=config, dtype=torch.bfloat16)
    pyint8.save(model, tmp_path / "saved")
    pyint8.convert(source, tmp_path / "converted", device=0, config=config, dtype=torch.bfloat16, progress=False)
    file = "model.safetensors"
    assert (tmp_path / "converted" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    pyint8.reload(model, tmp_path / "converted", progress=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_it_generates_and_saves(checkpoints: CheckpointStore, tmp_path: Any, name: str) -> None:
    config = pyint8.Int8Config(experts=True)
    model = pyint8.load(checkpoints.folder(ZOO[name], "bf16"), 0, config=config, dtype=torch.bfloat16)
    tokens = torch.arange(2, 26, device="cuda").view(2, 12)
    written = model.generate(tokens, max_new_tokens=5, do_sample=False)
    pyint8.save(model, tmp_path)
    again = pyint8.load(tmp_path, 0)
    assert torch.equal(again.generate(tokens, max_new_tokens=5, do_sample=False), written)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of twelve layers, so that each of two GPUs has some away from the border."""
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deep")
    randomise(AutoModelForCausalLM.from_config(config), "deep").to(torch.bfloat16).save_pretrained(folder)
    return folder


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("device_map", [0, "balanced"], ids=str)
def test_experts_land_in_their_place(
    deep: Path,
    experts: bool,
    device_map: Any,
    begun: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before there is a plan, or as it says: the same."""
    caplog.set_level(logging.INFO)
    arguments: dict[str, Any] = {
        "config": pyint8.Int8Config(experts=experts),
        "dtype": torch.bfloat16,
        "progress": False,
    }
    found = tensors_of(pyint8.load(deep, device_map, **arguments))
    assert len(begun) == (1 if device_map == 0 else torch.cuda.device_count())
    assert LOST not in caplog.text
    monkeypatch.setattr(first_tensors, "guessable", lambda _: [])
    expected = tensors_of(pyint8.load(deep, device_map, **arguments))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_int8_forms_of_experts_in_16_bit(
    deep: Path, tmp_path: Path, begun: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Their experts land in their place, too."""
    caplog.set_level(logging.INFO)
    usual = pyint8.load(deep, 0, dtype=torch.bfloat16, progress=False)
    pyint8.save(usual, tmp_path)
    found = tensors_of(pyint8.load(tmp_path, 0, progress=False))
    assert len(begun) == 2  # of the first load, too
    assert LOST not in caplog.text
    for name, tensor in tensors_of(usual).items():
        assert torch.equal(tensor, found[name]), name
