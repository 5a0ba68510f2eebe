"""What experts are guessed to become, by the names, dtypes and shapes of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import CPU, Spec, write

from pyint8.checkpoint import Checkpoint
from pyint8.streaming.guesses import Guess, are_right, guess_requests, guessable
from pyint8.streaming.requests import Part, TensorRequest, ToDtype, ToInt8

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROWS = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
LAYERS = (2, 10, 9)


def specs(dtype: str = "BF16", experts: int = 3, names: tuple[str, ...] = tuple(ROWS)) -> dict[str, Spec]:
    shapes = dict(zip(names, ROWS.values(), strict=True))
    return {
        f"model.layers.{layer}.mlp.experts.{number}.{name}.weight": (dtype, shapes[name])
        for layer in LAYERS
        for number in reversed(range(experts))
        for name in shapes
    }


def guessed(checkpoint: Checkpoint, guess: Guess) -> list[TensorRequest]:
    return guess_requests(guessable(checkpoint.values()), CPU, guess).requests


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_each_expert_lands_behind_the_one_before(tmp_path: Path, names: tuple[str, ...]) -> None:
    checkpoint = write(tmp_path / "x", specs(names=names))
    requests = guessed(checkpoint, Guess(are_int8=True, quantizer=1))
    first, second, last = names
    of_layer = [f"{number}.{name}" for number in range(3) for name in (first, second)]
    of_layer += [f"{number}.{last}" for number in range(3)]
    # The last layer is left to the plan.
    assert [request.entry.name for request in requests] == [
        f"model.layers.{layer}.mlp.experts.{each}.weight" for layer in (2, 9) for each in of_layer
    ]
    parts = [request.part for request in requests[:9]]
    assert [part.offset for part in parts if part] == [0, 24, 48, 72, 96, 120, 0, 24, 48]
    assert [part.shape for part in parts if part] == [(3, 12, 4)] * 6 + [(3, 4, 6)] * 3
    assert len({request.part.name for request in requests if request.part}) == 4
    assert {request.becomes for request in requests} == {ToInt8(BF16)}


@pytest.mark.parametrize(
    ("guess", "becomes"),
    [
        (Guess(are_int8=True), ToInt8(BF16)),
        (Guess(are_int8=True, dtype=F32), ToInt8(F32)),
        (Guess(are_int8=False), ToDtype(BF16)),
        (Guess(are_int8=False, dtype=F32), ToDtype(F32)),
    ],
)
def test_what_they_become(tmp_path: Path, guess: Guess, becomes: Any) -> None:
    checkpoint = write(tmp_path / "x", specs())
    requests = guessed(checkpoint, guess)
    assert {request.becomes for request in requests} == {becomes}
    assert guess.nbytes(request.entry for request in requests) == sum(request.final_bytes for request in requests)


def one_expert_less(found: dict[str, Spec]) -> None:
    for layer in LAYERS:
        del found[f"model.layers.{layer}.mlp.experts.1.up_proj.weight"]


def one_number_twice(found: dict[str, Spec]) -> None:
    for layer in LAYERS:
        found[f"model.layers.{layer}.mlp.experts.01.up_proj.weight"] = found.pop(
            f"model.layers.{layer}.mlp.experts.1.up_proj.weight"
        )


def one_shape(found: dict[str, Spec]) -> None:
    for layer in LAYERS:
        found[f"model.layers.{layer}.mlp.experts.2.gate_proj.weight"] = ("BF16", (5, 4))


def other_columns(found: dict[str, Spec]) -> None:
    for name in found:
        if "up_proj" in name:
            found[name] = ("BF16", (6, 3))


def flat(found: dict[str, Spec]) -> None:
    for name in found:
        found[name] = ("BF16", (24,))


def biases(found: dict[str, Spec]) -> None:
    found.update({name.replace("weight", "bias"): ("BF16", shape[:1]) for name, (_, shape) in list(found.items())})


@pytest.mark.parametrize("spoil", [one_expert_less, one_number_twice, one_shape, other_columns, flat, biases])
def test_what_is_unusual_is_left_to_the_plan(tmp_path: Path, spoil: Any) -> None:
    found = specs()
    spoil(found)
    names = [r.entry.name for r in guessed(write(tmp_path / "x", found), Guess(are_int8=True))]
    gates = [name for name in names if "down_proj" not in name]
    assert gates == []  # down projections may be as usual
    assert all(name.startswith("model.layers.") for name in names)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_what_kernels_do_not_read_is_left_to_the_plan(tmp_path: Path, dtype: str) -> None:
    assert guessed(write(tmp_path / "x", specs(dtype)), Guess(are_int8=True)) == []


@pytest.mark.parametrize(
    ("stored", "model", "is_same"),
    [
        ("BF16", F16, True),
        ("BF16", F32, True),
        ("F16", F32, True),
        ("F16", BF16, False),
        ("F32", F16, True),
        ("F32", BF16, False),
    ],
)
def test_codes_of_which_dtypes_are_the_same(tmp_path: Path, stored: str, model: torch.dtype, is_same: bool) -> None:
    requests = guessed(write(tmp_path / "x", specs(stored)), Guess(are_int8=True))
    wanted = [request._replace(becomes=ToInt8(model)) for request in requests]
    assert are_right(requests, wanted) == is_same


def other_place(request: TensorRequest) -> TensorRequest:
    assert request.part is not None
    return request._replace(part=request.part._replace(offset=request.part.offset + 1))


@pytest.mark.parametrize(
    "change",
    [
        other_place,
        lambda request: request._replace(part=None),
        lambda request: request._replace(part=Part("x", (3, 12, 5), 0)),
        lambda request: request._replace(becomes=ToDtype(BF16)),
        lambda request: request._replace(becomes=ToInt8(BF16, transposed=True)),
        lambda request: request._replace(device=torch.device("cuda", 1)),
        lambda request: request._replace(entry=replace(request.entry, offset=1)),
    ],
)
def test_one_that_is_wrong_makes_all_wrong(tmp_path: Path, change: Any) -> None:
    requests = guessed(write(tmp_path / "x", specs()), Guess(are_int8=True))
    renamed = [named_otherwise(request) for request in requests]
    other = TensorRequest(replace(requests[0].entry, name="other"), CPU, becomes=ToDtype(BF16))
    assert are_right(requests, [other, *renamed])
    assert not are_right(requests, renamed[:-1])
    assert not are_right(requests, [*renamed[:5], change(renamed[5]), *renamed[6:]])


def named_otherwise(request: TensorRequest) -> TensorRequest:
    """As the model calls its parameters."""
    assert request.part is not None
    return request._replace(part=request.part._replace(name=f"model's {request.part.name}"))


def test_parts_that_are_exchanged_between_parameters_are_wrong(tmp_path: Path) -> None:
    requests = guessed(write(tmp_path / "x", specs()), Guess(are_int8=True))
    wanted = [named_otherwise(request) for request in requests]
    assert wanted[0].part and wanted[9].part  # noqa: PT018  # of the first layer, and of the second
    names = wanted[0].part.name, wanted[9].part.name
    wanted[0] = wanted[0]._replace(part=wanted[0].part._replace(name=names[1]))
    wanted[9] = wanted[9]._replace(part=wanted[9].part._replace(name=names[0]))
    assert not are_right(requests, wanted)


def test_what_is_wanted_twice_is_wrong(tmp_path: Path) -> None:
    requests = guessed(write(tmp_path / "x", specs()), Guess(are_int8=True))
    assert are_right(requests, requests)
    assert not are_right(requests, [*requests, requests[3]])
    assert not are_right(requests, [requests[3]._replace(part=None), *requests])


def test_two_parameters_in_one_are_wrong(tmp_path: Path) -> None:
    requests = guessed(write(tmp_path / "x", specs()), Guess(are_int8=True))
    one = [request._replace(part=request.part and request.part._replace(name="x")) for request in requests]
    assert not are_right(requests, one)
