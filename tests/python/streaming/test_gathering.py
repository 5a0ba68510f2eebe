"""What a rank gathers at once has room in scratch together, whatever is read whole in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from local_ranks import on_ranks
from safetensors.torch import save_file

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.streaming.ranks import pieces
from pyint8.streaming.ranks.consumer import SharedConsumer
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToInt8

__all__ = ["driver"]  # a fixture

GPU = torch.device("cuda", 0)
# Bands of 85 KiB; the large weights are a batch.
OPTIONS = StreamOptions(threads=2, slot_bytes=1 << 16, device_scratch=1 << 20)
LARGE, SMALL = (128, 256), (75, 256)
PATIENCE = 200  # of the conductor's intervals


@pytest.fixture(autouse=True)
def waits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """For parts: what will never come is an error here, instead of a test that never ends."""
    await_parts, waits = SharedConsumer.await_parts, iter(range(PATIENCE))

    def patient(self: SharedConsumer, *arguments: Any) -> Any:
        found = await_parts(self, *arguments)
        assert found is not None or next(waits, None) is not None, "parts did not come"
        return found

    monkeypatch.setattr(SharedConsumer, "await_parts", patient)


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
@pytest.mark.parametrize("between", [4, 28])
def test_more_than_scratch_holds_between_two_of_a_batch(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: int
) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 40_000)
    shapes = {"a": LARGE} | {f"b{number:03}": SMALL for number in range(between)} | {"c": LARGE}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    entries = open_checkpoint(tmp_path / "x.safetensors")
    asked = [TensorRequest(entries[name], GPU, becomes=ToInt8(torch.bfloat16)) for name in shapes]

    def load(ranks: Ranks | None, _: int) -> list[bytes]:
        with open_stream(asked, OPTIONS, opener=driver.lane, quantizer=driver.quantizer, ranks=ranks) as stream:
            made = [stream.made(name) for name in shapes]
            stream.finish()
            driver.synchronize(0)
            return [each.tensor.numpy().tobytes() for each in made if each is not None]

    alone = load(None, 0)
    assert len(alone) == len(shapes)
    assert on_ranks(2, load, lambda: driver.synchronize(0)) == [alone] * 2
