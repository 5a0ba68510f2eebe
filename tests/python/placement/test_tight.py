"""Planned device maps that use all of the GPUs' memory before anything is offloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from torch import nn
from zoo import PREQUANTIZED, ZOO

import pyint8
from pyint8 import Int8Config, StreamOptions
from pyint8.errors import OptionError
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.hooks import StreamedInt8HfQuantizer
from pyint8.models.transformers.parameters import find_dtypes
from pyint8.models.transformers.planned import PlannedLoad
from pyint8.models.transformers.session import LoadSession
from pyint8.placement import budget
from pyint8.placement.budget import MemoryBudget, exact_bytes, memory_budget
from pyint8.placement.device_map import device_of
from pyint8.placement.tight import tight_memory
from pyint8.quantizer import Int8Quantizer, tensor_bytes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def gpus_are_believed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planners ask the driver for every GPU they are told of."""
    for where in ("accelerate.utils.modeling.get_max_memory", "transformers.integrations.accelerate.get_max_memory"):
        monkeypatch.setattr(where, dict)


def llama(skip: Sequence[str] = ("lm_head",), **fields: Any) -> tuple[Any, Int8Quantizer]:
    """On meta, its linear layers int8: blocks of 0.2 MB, an embedding and a head of 2 MB each."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 8192}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **{**sizes, **fields})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.float16)
    quantizer = Int8Quantizer(Int8Config())
    quantizer.preprocess_model(model, skip=list(skip), device_map=None)
    return model, quantizer


def sizes_of(model: Any, quantizer: Int8Quantizer) -> dict[str, int]:
    dtypes = find_dtypes(model, model.state_dict(), torch.float16, quantizer)
    return tensor_bytes(model, quantizer, dtypes, model.all_tied_weights_keys)


def tight(model: Any, budgets: dict[Any, int], spread: Any, quantizer: Int8Quantizer, plan: Any) -> dict[Any, float]:
    """`plan` is accelerate's, which does not know of scales."""
    sizes = sizes_of(model, quantizer)
    int8 = [weight for name, weight in model.named_parameters() if quantizer.check_quantized_param(name)]
    scales = sum(len(weight) * 4 for weight in int8)
    no_split = model._no_split_modules
    return tight_memory(model, budgets, spread, sizes, no_split, lambda some: plan(max_memory=some), scale_bytes=scales)


def plan_of(model: Any, quantizer: Int8Quantizer) -> tuple[Any, Any]:
    """accelerate's planners of a device map, and of an even spread."""
    special = {name: torch.int8 for name, _ in model.named_parameters() if quantizer.check_quantized_param(name)}
    rules = {"no_split_module_classes": ["LlamaDecoderLayer"], "special_dtypes": special}
    return partial(infer_auto_device_map, model, **rules), partial(get_balanced_memory, model, **rules)


def used(model: Any, quantizer: Int8Quantizer, device_map: Mapping[str, Any]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for name, size in sizes_of(model, quantizer).items():
        device = device_of(name, device_map)
        found[device] = found.get(device, 0) + size
    return found


def test_sizes_are_those_of_the_loaded_model() -> None:
    model, quantizer = llama()
    sizes = sizes_of(model, quantizer)
    assert sizes["model.layers.0.mlp.down_proj.weight"] == 128 * 256 + 128 * 4
    assert sizes["model.layers.0.input_layernorm.weight"] == 128 * 2
    assert sizes["lm_head.weight"] == sizes["model.embed_tokens.weight"] == 8192 * 128 * 2
    assert set(sizes) == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("checkpoint", ["bf16", PREQUANTIZED])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5", "qwen3_moe", "bert_mlm"])
def test_no_byte_is_forgotten(name: str, checkpoint: str, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 keeps some weights in float32, experts are merged, heads are tied."""
    planned: list[dict[str, int]] = []
    start = PlannedLoad.start

    def note(self: PlannedLoad, *rest: Any) -> None:
        model = self._model
        dtypes = find_dtypes(model, model.state_dict(), self._dtype, self._quantizer)
        planned.append(tensor_bytes(model, self._quantizer, dtypes, model.all_tied_weights_keys))
        start(self, *rest)

    monkeypatch.setattr(PlannedLoad, "start", note)
    model = load(name, checkpoint, model=ZOO[name].cls)
    taken = {}
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        scales = getattr(tensor, "SCB", None)
        taken[key] = tensor.nbytes + (0 if scales is None else scales.nbytes)
    assert planned == [taken]


def test_what_is_tied_and_converted_counts() -> None:
    model, quantizer = llama(skip=["nothing"], tie_word_embeddings=True)
    assert sizes_of(model, quantizer)["lm_head.weight"] == 8192 * 128 + 8192 * 4


def test_tied_weights_count_once() -> None:
    model, quantizer = llama(tie_word_embeddings=True)
    assert "lm_head.weight" not in sizes_of(model, quantizer)


def test_what_fits_on_one_gpu_stays_there() -> None:
    model, quantizer = llama()
    plan, balance = plan_of(model, quantizer)
    need = sum(sizes_of(model, quantizer).values())
    enough = {0: need, "cpu": 10 * need}
    spread = balance(max_memory=dict(enough))
    assert set(plan(max_memory=quantizer.adjust_max_memory(spread)).values()) == {0, "cpu"}  # as transformers plans
    memory = tight(model, enough, spread, quantizer, plan)
    assert plan(max_memory=memory) == {"": 0}
    less = {**enough, 0: need - 1}
    memory = tight(model, less, spread, quantizer, plan)
    device_map = plan(max_memory=memory)
    assert set(device_map.values()) == {0, "cpu"}
    assert used(model, quantizer, device_map)[0] < need


@pytest.mark.parametrize("gpus", [2, 3, 4])
@pytest.mark.parametrize("slack", [1.0, 1.05, 1.4, 3.0])
def test_what_fits_on_several_gpus_stays_there(gpus: int, slack: float) -> None:
    model, quantizer = llama()
    plan, balance = plan_of(model, quantizer)
    sizes = sizes_of(model, quantizer)
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    largest = max(sizes.values())
    enough = {gpu: int(slack * (sum(sizes.values()) / gpus + max(block, largest))) for gpu in range(gpus)}
    all_of_it: dict[Any, int] = {**enough, "cpu": 1 << 40}
    spread = balance(max_memory=dict(all_of_it))
    memory = tight(model, all_of_it, spread, quantizer, plan)
    taken = used(model, quantizer, plan(max_memory=dict(memory)))
    assert "cpu" not in taken
    assert all(taken[gpu] <= enough[gpu] for gpu in taken)
    if slack == 3.0:
        assert max(taken.values()) <= 1.5 * max(largest, sum(sizes.values()) / gpus)  # spread out, not piled up


def test_a_head_larger_than_an_even_share() -> None:
    """transformers #46823: every GPU but the last is skipped for good, and the rest spills."""
    model, quantizer = llama(vocab_size=65536, num_hidden_layers=4)
    plan, balance = plan_of(model, quantizer)
    sizes = sizes_of(model, quantizer)
    roomy: dict[Any, int] = {**dict.fromkeys(range(4), int(1.3 * max(sizes.values()))), "cpu": 1 << 40}
    spread = balance(max_memory=dict(roomy))
    assert "cpu" in plan(max_memory=quantizer.adjust_max_memory(spread)).values()
    memory = tight(model, roomy, spread, quantizer, plan)
    taken = used(model, quantizer, plan(max_memory=dict(memory)))
    assert "cpu" not in taken


def test_without_a_gpu_nothing_is_tried() -> None:
    model, quantizer = llama()
    plan, _ = plan_of(model, quantizer)
    assert tight(model, {"cpu": 5}, {"cpu": 5}, quantizer, plan) == {"cpu": 5}


@pytest.mark.parametrize("converted", [0, 1])
def test_transformers_asks_for_it(converted: int) -> None:
    model, quantizer = llama()
    enough: dict[Any, int] = {0: sum(sizes_of(model, quantizer).values()), "cpu": 1 << 40}
    hf_quantizer = StreamedInt8HfQuantizer(Int8Config(), pre_quantized=False)
    dtypes = find_dtypes(model, model.state_dict(), torch.float16, quantizer)
    planned: Any = SimpleNamespace(dtypes=dtypes, conversion_bytes=lambda: converted)
    hf_quantizer.int8, hf_quantizer._model, hf_quantizer._planned = quantizer, model, planned
    assert hf_quantizer.adjust_max_memory(dict(enough)) == {device: 0.9 * size for device, size in enough.items()}
    hf_quantizer.session.request = LoadRequest(budget=MemoryBudget(enough, is_exact=True))
    memory = hf_quantizer.adjust_max_memory(dict(enough))
    device_map = transformers.integrations.accelerate.infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=model._no_split_modules, hf_quantizer=hf_quantizer
    )
    assert (device_map == {"": 0}) == (converted == 0)  # not a byte is left for a conversion


def test_a_conversion_needs_memory_too(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    start = PlannedLoad.start
    monkeypatch.setattr(
        PlannedLoad, "start", lambda self, *rest: (found.append(self.conversion_bytes()), start(self, *rest))
    )
    load("llama")
    model = load("qwen3_moe")
    merged = model.model.layers[0].mlp.experts.gate_up_proj
    assert found == [0, 2 * merged.nbytes]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1000 MiB free, of which torch holds and does not use 10 on the second; and 500 MiB in the host."""
    monkeypatch.setattr(
        "pyint8.placement.budget.get_max_memory", lambda: {0: 1000 * MIB, 1: 990 * MIB, "cpu": 500 * MIB}
    )
    held, free = {0: 0, 1: 10 * MIB}, {0: 1000 * MIB, 1: 990 * MIB}
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        memory_reserved=held.__getitem__,
        memory_allocated=lambda gpu: 0,
        mem_get_info=lambda gpu: (free[gpu], 1 << 40),
    )
    monkeypatch.setattr(budget.torch, "cuda", cuda)


@pytest.mark.usefixtures("two_gpus")
def test_budgets_of_a_device_that_only_accelerate_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.placement.budget.get_max_memory", lambda: {2: 800 * MIB})
    assert exact_bytes(None, 600 * MIB) == {2: 200 * MIB}


@pytest.mark.usefixtures("two_gpus")
def test_budgets() -> None:
    assert memory_budget(None, 0, "auto", 600 * MIB).per_device == {0: 400 * MIB, 1: 400 * MIB, "cpu": 450 * MIB}
    assert memory_budget(None, 700 * MIB, "auto", 600 * MIB).per_device == {
        0: 300 * MIB,
        1: 300 * MIB,
        "cpu": 450 * MIB,
    }
    assert exact_bytes({1: "100MiB", "cpu": "1GiB"}, 700 * MIB) == {1: 100 * MIB, "cpu": 1024 * MIB}
    assert exact_bytes({0: "2GiB"}, 2000 * MIB) == {0: 0}
    unsorted = exact_bytes({"cpu": 5, 1: 2e9, 0: 3e8, 7: "1GiB"}, 0)  # there is no GPU 7
    assert list(unsorted.items()) == [(0, 300000000), (1, 1000 * MIB), (7, 1 << 30), ("cpu", 5)]


def test_a_load_with_headroom(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, int]] = []

    def note(max_memory: Any, headroom_bytes: int) -> dict[Any, int]:
        seen.append((max_memory, headroom_bytes))
        return {"cpu": 1 << 30}

    monkeypatch.setattr(budget, "exact_bytes", note)
    started: list[Any] = []
    start = LoadSession._start
    monkeypatch.setattr(
        LoadSession, "_start", lambda self, planned: (started.append(self.request.budget), start(self, planned))
    )
    load(device_map="auto", headroom="2GiB")
    load(device_map="auto", headroom=5, options=StreamOptions(device_scratch=300 * MIB))
    assert seen == [(None, 2 << 30), (None, 556 * MIB)]
    assert started
    assert all(each == MemoryBudget({"cpu": 1 << 30}, is_exact=True) for each in started)


@pytest.mark.parametrize("headroom", ["much", -1, "-1GiB", True, 1.5, "5"])
def test_a_headroom_that_is_no_size(headroom: Any, load: Any) -> None:
    with pytest.raises(OptionError, match=r"headroom is .*; it must be a number of bytes"):
        load(device_map="auto", headroom=headroom)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, None])
def test_headroom_is_for_plans(device_map: Any, load: Any) -> None:
    with pytest.raises(OptionError, match="headroom is for planned device maps \\(auto, balanced"):
        load(device_map=device_map, headroom=0)


def test_a_module_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Planned by accelerate itself, with the same rule."""
    from safetensors.torch import save_file

    from pyint8.placement import planner

    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    config = Int8Config(skip_modules=[])
    need = 4 * (64 * 64 + 64 * 4)
    maps: list[Any] = []
    plan = planner.plan_device_map

    def note(model: Any, device_map: Any, asked: MemoryBudget, *rest: Any) -> Any:
        assert asked.is_exact
        maps.append(plan(model, device_map, MemoryBudget({0: need, "cpu": 1 << 30}, is_exact=True), *rest))
        return {"": "cpu"}

    monkeypatch.setattr("pyint8.models.plain.plan_device_map", note)
    pyint8.load(tmp_path, device_map="auto", model=module, config=config, headroom=0)
    assert maps == [{"": 0}]
