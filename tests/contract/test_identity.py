"""The promise: what pyint8 loads is, byte for byte, what transformers loads with load_in_8bit.

tests/gpu runs the same matrix: it imports this module's tests and overrides the fixture `device_map`
(the variable IDENTITY_DEVICE does the same for one run).
Where pyint8 differs on purpose, a function named `expect_...` says how, and the comparison is made against the peer
helped to do what it should have done; no cell is left out.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from oracle import (
    SERIALIZABLE,
    compare_loading_info,
    compare_models,
    compare_outputs,
    compare_reloaded,
    compare_saved,
    describe,
    differences,
    peer_load,
    show,
    without_deserializers,
)
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from zoo import CHECKPOINTS, PREQUANTIZED, ZOO, CheckpointStore, ZooModel

import pyint8

DTYPES: tuple[torch.dtype | str, ...] = (torch.float16, torch.bfloat16, torch.float32, "auto")
AS_PREQUANTIZED = (torch.float16, "auto")  # zoo's pre-quantized checkpoints hold float16 beside int8
FRESH_HEAD = frozenset({"bert.pooler.dense", "classifier"})
DeviceMap = dict[str, int | str]


@dataclass(frozen=True)
class Expected:
    """The model ours must equal, the paths where it may differ, and what must hold there instead."""

    model: PreTrainedModel
    info: dict[str, Any]
    allow: tuple[str, ...] = (SERIALIZABLE,)
    checks: tuple[Callable[[PreTrainedModel], None], ...] = ()

    def but(self, allow: str, check: Callable[[PreTrainedModel], None]) -> "Expected":
        return replace(self, allow=(*self.allow, allow), checks=(*self.checks, check))


@pytest.fixture
def device_map() -> DeviceMap:
    device = os.environ.get("IDENTITY_DEVICE", "cpu")
    return {"": int(device) if device.isdigit() else device}


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # hundreds of cells save two models each


def expect_falcon_linears_quantized(expected: Expected) -> Expected:
    """FalconLinear is quantized as the peer quantizes nn.Linear (the peer leaves it alone), and source_cls says so."""

    def check(ours: PreTrainedModel) -> None:
        int8 = [module for module in ours.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
        assert int8
        assert {module.source_cls for module in int8} == {FalconLinear}
        assert not any(isinstance(module, FalconLinear) for module in ours.modules())

    return expected.but("modules/*/attributes/source_cls", check)


def expect_fresh_head_trainable(expected: Expected) -> Expected:
    """Modules absent from the checkpoint stay ordinary, as if the user had named them in llm_int8_skip_modules.

    They are named there, or transformers would take them for int8 in what we save. The list may keep what the
    peer skips by default beside them.
    """

    def check(ours: PreTrainedModel) -> None:
        for name in FRESH_HEAD:
            module = ours.get_submodule(name)
            assert type(module) is torch.nn.Linear
            assert all(parameter.requires_grad for parameter in module.parameters())
        skipped = set(ours.config.quantization_config.llm_int8_skip_modules)
        assert skipped >= FRESH_HEAD
        assert skipped <= FRESH_HEAD | {"classifier.bias"}

    return expected.but("*/llm_int8_skip_modules", check).but(
        "*/modules_to_not_convert", lambda ours: assert_superset(ours.hf_quantizer.modules_to_not_convert)
    )


def assert_superset(names: list[str]) -> None:
    assert set(names) >= FRESH_HEAD


def expect_saveable_conversions(expected: Expected) -> Expected:
    """The peer keeps its int8 deserializer among the conversions to revert, and so cannot save; ours leaves it out."""
    kept = describe(without_deserializers(expected.model._weight_conversions))

    def check(ours: PreTrainedModel) -> None:
        found = differences({"conversions": describe(ours._weight_conversions)}, {"conversions": kept})
        assert not found, show(found)

    return expected.but("modules//attributes/_weight_conversions*", check)


def expect_dtype_honoured(expected: Expected, quantized_on_the_fly: PreTrainedModel) -> Expected:
    """Unquantized tensors of a pre-quantized checkpoint get the dtype asked for; everything else stays byte-equal.

    The peer keeps every ".weight" as it is in the file. Which dtype a tensor should have (keep-in-fp32 modules) is
    read off the same model quantized on the fly at that dtype.
    """
    asked = dict(quantized_on_the_fly.named_parameters()) | dict(quantized_on_the_fly.named_buffers())
    for name, tensor in [*expected.model.named_parameters(), *expected.model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(asked[name].dtype)
    return expected


def peer_loads(zoo_model: ZooModel, folder: Path, **kwargs: Any) -> Expected:
    if zoo_model.name == "bert_fresh_head":
        skip = sorted(FRESH_HEAD)
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):  # the one in the checkpoint wins
            config.quantization_config["llm_int8_skip_modules"] = skip
            kwargs["config"] = config
    with zoo_model.peer_help():
        return Expected(*peer_load(folder, zoo_model.cls, **kwargs))


def expected_of(
    zoo_model: ZooModel, checkpoint: str, dtype: torch.dtype | str, device_map: DeviceMap, checkpoints: CheckpointStore
) -> Expected:
    placed = {"dtype": dtype, "device_map": device_map}
    expected = peer_loads(zoo_model, checkpoints.folder(zoo_model, checkpoint), **placed)
    if checkpoint == PREQUANTIZED:
        expected = expect_saveable_conversions(expected)
        if dtype not in AS_PREQUANTIZED:
            on_the_fly = peer_loads(zoo_model, checkpoints.folder(zoo_model, "fp16"), **placed)
            expected = expect_dtype_honoured(expected, on_the_fly.model)
    if zoo_model.name == "falcon":
        expected = expect_falcon_linears_quantized(expected)
    if zoo_model.name == "bert_fresh_head":
        expected = expect_fresh_head_trainable(expected)
    return expected


def load(folder: Path, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    torch.manual_seed(0)  # as peer_load: a fresh head is drawn
    model, report = pyint8.load(str(folder), return_report=True, **kwargs)
    return model, report


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_identity(
    name: str,
    dtype: torch.dtype | str,
    checkpoint: str,
    device_map: DeviceMap,
    checkpoints: CheckpointStore,
    scratch: Path,
) -> None:
    zoo_model = ZOO[name]
    expected = expected_of(zoo_model, checkpoint, dtype, device_map, checkpoints)
    ours, report = load(
        checkpoints.folder(zoo_model, checkpoint), device_map=device_map, dtype=dtype, model=zoo_model.cls
    )
    found = compare_models(ours, expected.model, allow=expected.allow)
    found += compare_loading_info(report.loading_info, expected.info)
    for check in expected.checks:
        check(ours)
    with zoo_model.peer_help():  # where the peer has to read back what ours saved
        found += compare_saved(ours, expected.model, scratch, allow=expected.allow)
    found += compare_outputs(ours, expected.model, zoo_model.inputs(expected.model))
    assert not found, show(found)


@pytest.mark.parametrize("name", ZOO)
def test_class_is_found_in_the_config(name: str, device_map: DeviceMap, checkpoints: CheckpointStore) -> None:
    zoo_model = ZOO[name]
    folder = checkpoints.folder(zoo_model, "bf16")
    kwargs: dict[str, Any] = {"dtype": torch.float16, "device_map": device_map}
    with zoo_model.peer_help():
        theirs, info = peer_load(folder, type(zoo_model.build()), **kwargs)
    ours, report = load(folder, **kwargs)
    allow = ["modules/*/attributes/source_cls"] if name == "falcon" else []
    allow.append(SERIALIZABLE)
    found = compare_models(ours, theirs, allow=allow) + compare_loading_info(report.loading_info, info)
    assert not found, show(found)


@pytest.mark.parametrize("placement", [None, "auto"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_placement_left_to_the_loader(name: str, placement: str | None, checkpoints: CheckpointStore) -> None:
    zoo_model = ZOO[name]
    folder = checkpoints.folder(zoo_model, "bf16")
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": placement}
    theirs, info = peer_load(folder, zoo_model.cls, **kwargs)
    ours, report = load(folder, model=zoo_model.cls, **kwargs)
    found = compare_models(ours, theirs, allow=(SERIALIZABLE,)) + compare_loading_info(report.loading_info, info)
    assert not found, show(found)


def test_fresh_head_reads_back(device_map: DeviceMap, checkpoints: CheckpointStore, scratch: Path) -> None:
    zoo_model = ZOO["bert_fresh_head"]
    folder = checkpoints.folder(zoo_model, "bf16")
    ours, _ = load(folder, device_map=device_map, dtype=torch.float16, model=zoo_model.cls)
    ours.save_pretrained(scratch)
    reloaded, _ = peer_load(scratch, zoo_model.cls, dtype="auto", device_map=device_map)
    found = compare_reloaded(ours, scratch) + compare_outputs(ours, reloaded, zoo_model.inputs(ours))
    assert not found, show(found)
