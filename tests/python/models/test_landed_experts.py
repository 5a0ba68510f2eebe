"""Experts whose parts a GPU's consumer makes in their place, over the fake driver: named where they are bad."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver, driver
from pours import GPU, OPTIONS, checkpoint_of, random_weight

from pyint8 import Int8Config, _core
from pyint8.models.assembly import Assembly, Destination, ExpertPart
from pyint8.quantizer import BadWeight, Int8Quantizer
from pyint8.report import Recorder
from pyint8.streaming.reading import open_stream

__all__ = ["driver"]  # a fixture

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")

EXPERTS, ROWS, INNER = 3, 20, 64
NAME = "mlp.experts.gate_up_proj"


def parts_of(folder: Path, weights: dict[str, torch.Tensor]) -> list[ExpertPart]:
    """Gates before ups in each expert's rows, in the checkpoint all gates first."""
    entries = checkpoint_of(folder, weights)
    return [
        ExpertPart(entries[f"{expert}.{kind}"], expert, row)
        for kind, row in (("gate", 0), ("up", ROWS))
        for expert in range(EXPERTS)
    ]


def some_weights() -> dict[str, torch.Tensor]:
    names = [f"{expert}.{kind}" for expert in range(EXPERTS) for kind in ("gate", "up")]
    return {name: random_weight(ROWS, INNER, torch.bfloat16, seed) for seed, name in enumerate(names)}


@contextmanager
def made(driver: FakeDriver, parts: list[ExpertPart]) -> Iterator[tuple[dict[str, torch.Tensor], Int8Quantizer]]:
    quantizer = Int8Quantizer(Int8Config(experts=True))
    assembly = Assembly(quantizer, Recorder())
    # GPU 0 is the fake's, whose memory is the host's.
    requests = assembly.expert_requests(NAME, parts, Destination(GPU, torch.bfloat16))
    with open_stream(requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer) as stream:
        found = assembly.make_experts(NAME, parts, Destination(torch.device("cpu"), torch.bfloat16), stream)
        stream.finish()
        driver.synchronize(0)
        yield found, quantizer


def test_bad_rows_are_named_by_the_parts_they_are_in(driver: FakeDriver, tmp_path: Path) -> None:
    weights = some_weights()
    weights["1.gate"][7, 3] = float("nan")
    weights["2.up"][0, 0] = weights["2.up"][5, 1] = float("inf")
    with made(driver, parts_of(tmp_path, weights)) as (_, quantizer):
        assert quantizer.health.bad_weights() == [BadWeight("1.gate", 7), BadWeight("2.up", 0)]


def test_bad_scales_of_codes_are_named_by_the_parts_they_are_in(driver: FakeDriver, tmp_path: Path) -> None:
    weights = {name: weight.to(torch.int8) for name, weight in some_weights().items()}
    scales = {f"{name}.SCB": torch.ones(ROWS) for name in weights}
    scales["1.gate.SCB"][7] = scales["2.up.SCB"][5] = scales["2.up.SCB"][6] = float("inf")
    entries = checkpoint_of(tmp_path, weights | scales)
    parts = [
        ExpertPart(entries[f"{expert}.{kind}"], expert, row, scales=entries[f"{expert}.{kind}.SCB"])
        for expert in range(EXPERTS)
        for kind, row in (("gate", 0), ("up", ROWS))
    ]
    with made(driver, parts) as (found, quantizer):
        assert quantizer.health.bad_weights() == [BadWeight("1.gate", 7), BadWeight("2.up", 5)]
        for part in parts:
            rows = slice(part.row, part.row + ROWS)
            assert torch.equal(found[NAME][part.expert, rows], weights[part.entry.name])
