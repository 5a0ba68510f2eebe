"""The order in which ranks' consumers serve what is early and what is to be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyint8.checkpoint import open_checkpoint
from pyint8.streaming.ranks.transport import between_early
from pyint8.streaming.requests import TensorRequest

NAMES = [f"{number}" for number in range(40)]


@pytest.fixture
def requests(tmp_path: Path) -> list[TensorRequest]:
    save_file({name: torch.zeros(500, dtype=torch.bfloat16) for name in NAMES}, tmp_path / "x.safetensors")
    entries = open_checkpoint(tmp_path / "x.safetensors")
    return [TensorRequest(entries[name], torch.device("cpu")) for name in NAMES]


def order(requests: list[TensorRequest], early: list[str]) -> list[str]:
    return [request.entry.name for request in between_early(requests, early)]


def test_between_what_is_early_others_are_read(requests: list[TensorRequest]) -> None:
    found = order(requests, NAMES[:20])
    assert sorted(found, key=int) == NAMES
    assert found[:7] == ["0", "20", "1", "2", "21", "3", "4"]
    assert found.index("19") == 19 + 8  # 0.4 of as many others
    assert found[28:] == NAMES[28:]


def test_others_that_are_taken_first_come_first(requests: list[TensorRequest]) -> None:
    """Wherever what is early is: norms before and between, which are small, say."""
    found = order(requests, NAMES[1::2])
    assert [name for name in found if int(name) % 2] == NAMES[1::2]
    assert [name for name in found if int(name) % 2 == 0] == NAMES[::2]
    assert found[:2] == ["1", "0"]


def test_without_anything_early_nothing_changes(requests: list[TensorRequest]) -> None:
    assert order(requests, []) == NAMES
    assert order(requests, NAMES) == NAMES
