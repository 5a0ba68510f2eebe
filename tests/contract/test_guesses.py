"""Experts that land in their place before there is a plan, as it was guessed; over the fake driver."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import driver
from guessing import LOST, Load, begun, default_stream, folder, load, other_order
from oracle import state
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM
from zoo import randomise

import pyint8
from pyint8 import _core
from pyint8.errors import DeviceError, NonFiniteWeightError
from pyint8.models.transformers import loading
from pyint8.streaming import first_tensors, guessed_pours, guesses, head_start
from pyint8.streaming.head_start import HeadStart
from pyint8.streaming.lane import Lane
from pyint8.streaming.made import Place
from pyint8.streaming.pour import Pour
from pyint8.streaming.requests import TensorRequest

__all__ = ["begun", "default_stream", "driver", "folder", "load"]  # fixtures

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


@pytest.mark.parametrize("experts", [True, False])
def test_the_model_is_the_same(
    load: Load, folder: Path, experts: bool, begun: list[int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    found = state(load(folder, experts=experts))
    assert begun
    assert LOST not in caplog.text
    monkeypatch.setattr(first_tensors, "guess_requests", lambda *_: guesses.Guessed([], None))
    assert found == state(load(folder, experts=experts))
    assert len(begun) == 1


@pytest.mark.parametrize("experts", [True, False])
def test_int8_forms(
    load: Load, folder: Path, tmp_path: Path, experts: bool, begun: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Their experts in 16 bit land in their place, too; those in int8 are codes already: nothing is guessed of them."""
    pyint8.convert(folder, tmp_path / "form", device="cpu", config=pyint8.Int8Config(experts=experts), progress=False)
    caplog.set_level(logging.INFO)
    found = load(tmp_path / "form", experts=None)
    assert LOST not in caplog.text
    assert len(begun) == (0 if experts else 1)
    assert state(found) == state(pyint8.load(tmp_path / "form", "cpu", progress=False))


def other_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "Guess", lambda are_int8, *others: guesses.Guess(not are_int8, *others))


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is guessed, as long as that is tried."""
    allocate = Pour._allocate

    def taken(self: Pour, request: TensorRequest) -> Place:
        if threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError
        return allocate(self, request)

    monkeypatch.setattr(Pour, "_allocate", taken)


def no_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Pour.ask

    def refused(self: Pour, count: int = 1) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise DeviceError("no more memory can be pinned")
        ask(self, count)

    monkeypatch.setattr(Pour, "ask", refused)


@pytest.mark.parametrize("spoil", [other_order, other_experts, no_memory, no_pinned_memory])
def test_a_wrong_guess_costs_time_and_nothing_else(
    load: Load, folder: Path, spoil: Callable[[pytest.MonkeyPatch], None], caplog: Any
) -> None:
    expected = state(load(folder, experts=True))
    caplog.set_level(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch)
        assert state(load(folder, experts=True)) == expected
    assert LOST in caplog.text


@pytest.mark.parametrize("error", [DeviceError("no kernels"), torch.OutOfMemoryError()], ids=str)
def test_what_cannot_be_begun_is_left_to_the_plan(
    load: Load, folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = state(load(folder, experts=True))
    caplog.set_level(logging.INFO)

    def refused(*_: Any) -> Pour:
        raise type(error)(*error.args)

    monkeypatch.setattr(guessed_pours, "Pour", refused)
    assert state(load(folder, experts=True)) == expected
    assert LOST not in caplog.text


def test_the_first_bad_weight_is_told(load: Load, tmp_path: Path, begun: list[int]) -> None:
    """Of those that land before there is a plan, here the second layer's experts, and those that do not."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    randomise(MixtralForCausalLM(config), "three layers").to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [
        next(name for name in tensors if part in name)
        for part in ("0.self_attn.q_proj", "1.block_sparse_moe.experts.2.w1")
    ]
    for name in names:
        tensors[name][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeightError) as caught:
        load(tmp_path, experts=True)
    assert begun == [2 * 12]
    assert caught.value.tensor == names[0]


@pytest.mark.parametrize("has_threads", [True, False])
def test_without_room_or_threads_it_is_as_before(
    load: Load, folder: Path, has_threads: bool, begun: list[int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = state(load(folder, experts=True))
    caplog.set_level(logging.INFO)
    asked: list[int] = []
    ask = HeadStart._ask_for

    def asking(self: HeadStart, lane: Lane, entries: Any) -> bool:
        asked.append(len(entries))
        return ask(self, lane, entries)

    monkeypatch.setattr(HeadStart, "_ask_for", asking)
    if has_threads:
        monkeypatch.setattr(head_start, "_has_room", lambda part, _: part.guess is None)
    else:
        monkeypatch.setattr(HeadStart, "_start", lambda *_: False)
    assert state(load(folder, experts=True)) == expected
    assert len(begun) == 1
    assert (asked != []) == has_threads
    assert LOST not in caplog.text


@pytest.mark.parametrize("has_code", [True, False])
def test_code_beside_the_weights_is_not_guessed(load: Load, copy_of: Any, has_code: bool, begun: list[int]) -> None:
    """It may have its experts otherwise."""
    folder = copy_of("mixtral", "bf16")
    if has_code:
        (folder / "modeling_own.py").write_text("")
    load(folder, experts=True, trust_remote_code=True)
    assert len(begun) == (0 if has_code else 1)


def test_a_dtype_in_a_dict(load: Load, folder: Path, begun: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load(folder, experts=False, dtype={"": torch.float16})
    assert len(begun) == 1
    assert LOST not in caplog.text


def test_modules_that_are_skipped_are_as_they_were(load: Load, folder: Path, begun: list[int], caplog: Any) -> None:
    """The guess is wrong there, of one layer, or of all."""
    caplog.set_level(logging.INFO)
    some = load(folder, experts=True, skip_modules=["model.layers.0.mlp.experts"])
    assert begun
    assert LOST in caplog.text
    kinds = [type(layer.mlp.experts).__name__ for layer in some.model.layers]
    assert [kind.startswith("Int8") for kind in kinds] == [False] + [True] * (len(kinds) - 1)


def test_a_load_that_fails_before_its_plan_gives_all_back(
    load: Load, folder: Path, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's fixture sees it."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr("pyint8.models.transformers.planned.plan_load", fail)
    with pytest.raises(RuntimeError, match="no plan"):
        load(folder, experts=True)
    assert begun
