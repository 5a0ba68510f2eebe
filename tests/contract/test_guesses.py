"""Experts that land in their place before there is a plan, as it was guessed; over the fake driver, whose GPU's memory
torch takes for the host's."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from oracle import state
from pours import GPU
from safetensors.torch import load_file, save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import StreamOptions, _core
from pyint8.errors import DeviceError, NonFiniteWeightError
from pyint8.models.transformers import loading, parameters
from pyint8.streaming import first_tensors, guessed_pours, guesses, head_start
from pyint8.streaming.head_start import HeadStart
from pyint8.streaming.lane import Lane, open_lane
from pyint8.streaming.made import Place
from pyint8.streaming.pour import Pour
from pyint8.streaming.requests import TensorRequest

__all__ = ["driver"]  # a fixture

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")

CPU = torch.device("cpu")
LOST = "all is read again"
Load = Callable[..., Any]


class WithContext(HeadStart):
    """Of a process that has used the GPU before."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._has_context = True


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many requests a head start had results made, of each load."""
    found: list[int] = []

    def made(*arguments: Any) -> Pour:
        found.append(len(arguments[2]))
        return Pour(*arguments)

    monkeypatch.setattr(guessed_pours, "Pour", made)
    return found


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO[request.param], "bf16")


@pytest.fixture(scope="module", autouse=True)
def default_stream() -> None:
    """The fake's has a thread, which the process keeps from its first use on."""
    if path := os.environ.get("PYINT8_TEST_LIBCUDA"):
        FakeDriver(path).synchronize(0)


@pytest.fixture
def load(folder: Path, nothing_left: None, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`pyint8.load` onto the fake's GPU."""

    opened: list[Lane] = []
    only_gpu = True

    def opener(engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
        if opened and not only_gpu:  # the second is for the host
            return open_lane(engine, device, options)
        opened.append(driver.lane(engine, GPU, options))
        return opened[-1]

    monkeypatch.setattr(first_tensors, "first_gpu", lambda _: (CPU, True))
    monkeypatch.setattr(first_tensors, "HeadStart", partial(WithContext, opener=opener))
    for user in (loading, parameters):
        monkeypatch.setattr(user, "find_entry_point", lambda: driver.quantizer)
    options = StreamOptions(threads=2, slot_bytes=8192, device_scratch=1 << 20)

    def loaded(folder: Path, *, experts: bool | None, skip_modules: Any = None, **arguments: Any) -> Any:
        nonlocal only_gpu
        only_gpu = experts is not None  # int8 forms have a byte for the host with each weight
        config = None if experts is None else pyint8.Int8Config(experts=experts, skip_modules=skip_modules)
        arguments = {"dtype": "auto", "progress": False, "options": options, **arguments}
        model = pyint8.load(folder, {"": "cpu"}, config=config, **arguments)
        driver.synchronize(0)
        opened.clear()
        return model

    return loaded


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


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    families = [(second, first, last) for first, second, last in guesses._FAMILIES]
    monkeypatch.setattr(guesses, "_FAMILIES", families)


def other_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "Guess", lambda are_int8, *others: guesses.Guess(not are_int8, *others))


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(_: Pour) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Pour, "allocate", taken)


@pytest.mark.parametrize("spoil", [other_order, other_experts, no_memory])
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


@pytest.fixture
def wholes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Every tensor that experts land in, while Python collects no cycles."""
    found: list[weakref.ref[torch.Tensor]] = []
    allocate = Pour._allocate

    def noting(self: Pour, request: TensorRequest) -> Place:
        place = allocate(self, request)
        if request.part is not None:
            found.append(weakref.ref(place.made.tensor))
        return place

    monkeypatch.setattr(Pour, "_allocate", noting)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def alive(wholes: list[weakref.ref[torch.Tensor]]) -> int:
    return sum(each() is not None for each in wholes)


@pytest.mark.parametrize("experts", [True, False])
def test_streams_and_contexts_do_not_wait_for_the_collector(
    load: Load, folder: Path, experts: bool, driver: FakeDriver, wholes: list[Any]
) -> None:
    model = load(folder, experts=experts)
    assert not any(driver.counters().values())
    del model


@pytest.mark.parametrize("where", ["maker", "stream"])
def test_a_load_that_fails_gives_memory_back_at_once(
    load: Load, folder: Path, where: str, wholes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever catches the error may try something smaller."""

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    if where == "maker":
        monkeypatch.setattr(parameters, "_reserve_memory", fail)
        monkeypatch.setattr("pyint8.streaming.preparation.Preparation.reserves_memory", False)
    else:
        monkeypatch.setattr("pyint8.streaming.stream.open_pours", fail)
    with suppress(torch.OutOfMemoryError):
        load(folder, experts=True)
    assert len(wholes) > 0
    assert alive(wholes) == 0


def test_a_wrong_guess_gives_memory_back_before_more_is_taken(
    load: Load, folder: Path, wholes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other_order(monkeypatch)
    left: list[int] = []
    make = parameters.TensorStream

    def looking(*arguments: Any, **options: Any) -> Any:
        left.append(alive(wholes))
        return make(*arguments, **options)

    monkeypatch.setattr(parameters, "TensorStream", looking)
    load(folder, experts=True)
    assert len(wholes) > 0
    assert left == [0]


def test_the_first_bad_weight_is_told(load: Load, copy_of: Any, begun: list[int]) -> None:
    """Of those that land before there is a plan, and those that do not."""
    folder = copy_of("mixtral", "bf16")
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    names = sorted(name for name in tensors if ".experts.1.w1" in name)
    for name in names:
        tensors[name][3, 5] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFiniteWeightError) as caught:
        load(folder, experts=True)
    assert begun
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
        monkeypatch.setattr(head_start, "_has_room", lambda part: part.guess is None)
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
