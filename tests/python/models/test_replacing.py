"""A reload's writes over the GPU's consumer, with the fake driver: many are made, then written, then released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from safetensors.torch import save_file

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.models import replacing
from pyint8.models.live import Place
from pyint8.models.replacing import Replacement, by_turns
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToDtype, ToInt8
from pyint8.streaming.stream import TensorStream

__all__ = ["driver"]  # a fixture

GPU = torch.device("cuda", 0)
OPTIONS = StreamOptions(threads=3, slot_bytes=8192, device_scratch=1 << 20)


class Maker:
    """The fake's memory is not copied in the order of a GPU's stream, so it is waited for here."""

    def __init__(self, stream: TensorStream, driver: FakeDriver) -> None:
        self._stream = stream
        self._driver = driver

    def make(self, name: str, _: Any) -> dict[str, torch.Tensor]:
        made = self._stream.made(name)
        assert made is not None
        made.tensor.SCB = made.scales  # type: ignore[attr-defined]
        return {name: made.tensor}

    def wait(self, name: str) -> None:
        self._stream.wait([name])
        self._driver.synchronize(0)

    def release(self, name: str) -> None:
        self._stream.release([name])


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
@pytest.mark.parametrize("checked_bytes", [1, 30_000, 10**9])
@pytest.mark.parametrize("most_bytes", [1, 50_000, 10**9])
def test_more_is_made_than_there_is_room_for(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int, checked_bytes: int
) -> None:
    monkeypatch.setattr(replacing, "_CHECKED_BYTES", checked_bytes)
    weights = {f"w{n:02}": torch.randn(90 + n, 70, generator=torch.Generator().manual_seed(n)) for n in range(40)}
    save_file(weights, tmp_path / "model.safetensors")
    entries = open_checkpoint(tmp_path / "model.safetensors")
    becomes = {name: ToInt8(torch.float16) if n % 2 else ToDtype(torch.bfloat16) for n, name in enumerate(weights)}
    requests = [TensorRequest(entries[name], GPU, True, becomes=becomes[name]) for name in weights]
    places = {name: [_place(name, weight, codes=n % 2 == 1)] for n, (name, weight) in enumerate(weights.items())}
    with open_stream(
        requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer, most_bytes=most_bytes
    ) as stream:
        Replacement(places, lambda: None).run(weights, Maker(stream, driver))
    for name, weight in weights.items():
        (place,) = places[name]
        if place.is_int8:
            scales = weight.half().float().abs().amax(dim=1)
            codes = (weight.half().float() * (torch.full_like(scales, 127) / scales)[:, None]).round().to(torch.int8)
            assert torch.equal(place.scales[0], scales)
            assert torch.equal(place.values[0], codes)
        else:
            assert torch.equal(place.values[0], weight.to(torch.bfloat16))


def _place(name: str, weight: torch.Tensor, *, codes: bool) -> Place:
    if not codes:
        return Place(name, (torch.zeros(weight.shape, dtype=torch.bfloat16),))
    return Place(name, (torch.zeros(weight.shape, dtype=torch.int8),), (torch.zeros(len(weight)),))


def test_each_gpu_has_its_turn() -> None:
    devices = dict(zip("abcdefg", [0, 0, 0, 1, 1, "cpu", 0], strict=True))

    def device_of(name: str) -> torch.device:
        return torch.device("cpu") if devices[name] == "cpu" else torch.device("cuda", int(devices[name]))

    assert by_turns("abcdefg", device_of) == ["a", "d", "f", "b", "e", "c", "g"]
    assert by_turns("abcg", device_of) == ["a", "b", "c", "g"]
    assert by_turns("abfcg", device_of) == ["a", "b", "f", "c", "g"]
