"""Which of the tensors that ranks load together land whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyint8.checkpoint import open_checkpoint
from pyint8.streaming.ranks import pieces, wholes
from pyint8.streaming.ranks.wholes import whole_ones
from pyint8.streaming.requests import Part, TensorRequest, ToDtype, ToInt8


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TensorRequest]:
    """Ten of 2,000 bytes, each after a small one; each becomes 1,000 codes and 10 scales."""
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 1000)
    monkeypatch.setattr(wholes, "_WHOLE_BYTES", 2500)
    shapes = {f"{number}{small}": (1 if small else 10, 100) for number in range(10) for small in ("b", "")}
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, tmp_path / "w.safetensors"
    )
    entries = open_checkpoint(tmp_path / "w.safetensors")
    becomes = ToInt8(torch.bfloat16)
    return [TensorRequest(entries[name], torch.device("cpu"), becomes=becomes) for name in shapes]


def all_results(requests: list[TensorRequest]) -> int:
    return sum(request.allocated_bytes for request in requests)


def test_they_land_whole_while_there_is_room_beside_their_results(weights: list[TensorRequest]) -> None:
    budget = all_results(weights)
    assert budget == 10 * (1040 + 104)
    found = whole_ones(weights, [], budget, 2)
    assert found == {f"{number}" for number in range(7)}  # of the eighth on, 2,288 bytes or less are free behind it
    assert whole_ones(weights, ["0", "5"], budget, 2) == found - {"0", "5"}
    assert whole_ones(weights, [], budget - 1144, 2) == {f"{number}" for number in range(6)}
    assert whole_ones(weights, [], 2000, 2) == set()


def test_what_all_ranks_read_does_not(weights: list[TensorRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 2001)
    assert whole_ones(weights, [], all_results(weights), 2) == set()


@pytest.mark.parametrize("becomes", [None, ToDtype(torch.bfloat16), ToDtype(torch.float32)])
def test_none_lands_whole_behind_one_that_does_not(weights: list[TensorRequest], becomes: ToDtype | None) -> None:
    """Its bands are gathered behind whatever lands whole."""
    weights[7] = weights[7]._replace(becomes=becomes)
    assert whole_ones(weights, [], 10**6, 2) == {"0", "1", "2"}
    assert whole_ones(weights, ["3"], 10**6, 2) == {f"{number}" for number in range(10)} - {"3"}


def test_one_that_is_larger_than_all_that_may_be_on_its_way(
    weights: list[TensorRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wholes, "_WHOLE_BYTES", 1999)
    assert whole_ones(weights, [], 10**6, 2) == set()


def test_a_whole_of_parts_takes_its_memory_once(weights: list[TensorRequest]) -> None:
    parts = [
        request._replace(part=Part("all", (10, 10, 100), number * 1000)) for number, request in enumerate(weights[1::2])
    ]
    assert parts[0].allocated_bytes == 10_000 + 400
    assert whole_ones(parts, [], 10_400 + 2500, 2) == {f"{number}" for number in range(10)}
    assert whole_ones(parts, [], 10_400 + 2499, 2) == set()
