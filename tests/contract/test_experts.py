"""Experts in int8, of every architecture that transformers keeps them fused in: codes, scales, outputs, and no more."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from architectures import MODEL_TYPES, NotBuiltError, build
from oracle import state
from zoo import ZOO, CheckpointStore, randomise

import pyint8
from pyint8.errors import (
    ModelNotSupportedError,
)
from pyint8.placement.budget import MemoryBudget
from pyint8.quantizer import EXPERT_SCALES
from pyint8.quantizer.experts.kinds import kind_of
from pyint8.quantizer.experts.modules import Int8Experts, why_not_experts
from pyint8.quantizer.experts.names import WEIGHTS
from pyint8.streaming.guesses import Guess, are_right, guess_requests, guessable
from pyint8.streaming.head_start import Begun
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.requests import TensorRequest

KWARGS: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}
LEAST_COMPARED = 50
LEAST_GUESSED = 18  # small models that have experts in two layers, each in tensors of its own

compared: set[str] = set()
guessed: set[str] = set()


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many tensors each load would guess what becomes of them, were it one onto a GPU; all of them rightly."""
    start, take, found = Preparation.start_head_start, Preparation.take_over, []
    own: dict[int, Guess | None] = {}

    def starting(self: Preparation, device_map: Any, budget: MemoryBudget, guess: Guess | None = None) -> None:
        own[id(self)] = guess
        start(self, device_map, budget, guess)

    def looking(self: Preparation, gpus: int, wanted: Iterable[TensorRequest] = ()) -> Begun:
        asked, guess = list(wanted), own[id(self)]
        assert self.checkpoint is not None
        assert guess is not None
        each = guess_requests(guessable(self.checkpoint.values()), torch.device("cpu"), guess).requests
        assert are_right(each, asked)
        found.append(len(each))
        return take(self, gpus, asked)

    monkeypatch.setattr(Preparation, "start_head_start", starting)
    monkeypatch.setattr(Preparation, "take_over", looking)
    return found


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
def test_codes_and_scales_are_those_of_linear8bitlt(model_type: str, tmp_path: Path, guesses: list[int]) -> None:
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
    if guesses[0]:
        guessed.add(model_type)
    for name, parameter in usual.named_parameters():  # all else is as it was
        if name.rpartition(".")[2] not in WEIGHTS:
            assert torch.equal(parameter, ours.get_parameter(name)), name
    pyint8.save(ours, tmp_path / "int8")
    again = pyint8.load(tmp_path / "int8", model=type(model), progress=False, **KWARGS)
    assert state(again) == state(ours)
    assert [type(module) for module in again.modules()] == [type(module) for module in ours.modules()]
    pyint8.save(ours, tmp_path / "whole", fused_experts=True)
    assert state(pyint8.load(tmp_path / "whole", model=type(model), progress=False, **KWARGS)) == state(ours)
    pyint8.save(usual, tmp_path / "usual")
    assert state(pyint8.load(tmp_path / "usual", model=type(model), progress=False, **KWARGS)) == state(usual)
    assert guesses == [*guesses[:1] * 2, 0, 0, *guesses[:1]]  # int8 experts are what they are already


def compare(ours: Any, theirs: Any) -> int:
    checked = 0
    for name in WEIGHTS:
        weight = theirs._parameters.get(name)
        if weight is None:
            continue
        kind = kind_of(theirs)
        assert kind is not None
        for expert, one in enumerate(weight.transpose(1, 2) if kind.is_transposed else weight):
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(one.contiguous().half())
            assert torch.equal(codes, getattr(ours, name)[expert])
            assert torch.equal(scales, getattr(ours, name + EXPERT_SCALES)[expert])
            checked += 1
    return checked


def test_many_were_compared() -> None:
    assert len(compared) >= LEAST_COMPARED
    assert len(guessed) >= LEAST_GUESSED


def with_weights_of(theirs: Any, ours: Any) -> Any:
    """A model in fp32 whose experts have the weights that codes of another stand for, and all else in common."""
    for name, module in ours.named_modules():
        if isinstance(module, Int8Experts):
            whole = theirs.get_submodule(name)
            kind = kind_of(whole)
            assert kind is not None
            for part in [part for part in WEIGHTS if part in module._parameters]:
                values = getattr(module, part) * getattr(module, part + EXPERT_SCALES).unsqueeze(-1) / 127
                getattr(whole, part).data = (values.transpose(1, 2) if kind.is_transposed else values).contiguous()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            theirs.set_submodule(name, module)
    return theirs


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


def test_what_changes_codes_is_refused(mixture: tuple[Any, Any]) -> None:
    experts = next(module for module in mixture[0].modules() if isinstance(module, Int8Experts))
    torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    with pytest.raises(ModelNotSupportedError, match=r"in every forward pass \(a parametrization\), which are int8"):
        mixture[0](TOKENS)


def test_they_stay_int8_when_the_model_is_cast(mixture: tuple[Any, Any]) -> None:
    for module in mixture[0].modules():
        if isinstance(module, Int8Experts):
            module.to(torch.bfloat16)
            assert {value.dtype for name, value in module.state_dict().items() if "_bias" not in name} == {
                torch.int8,
                torch.float32,
            }
