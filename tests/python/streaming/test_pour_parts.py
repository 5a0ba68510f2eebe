"""Parts of larger tensors, which the GPU's consumer makes in their place, over the fake driver."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver, driver
from pours import DTYPES, GPU, OPTIONS, checkpoint_of, pour, random_weight

from pyint8 import _core
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import Part, TensorRequest, ToDtype, ToInt8
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

__all__ = ["driver"]  # a fixture

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_land_in_their_place(driver: FakeDriver, tmp_path: Path, dtype: torch.dtype, to: torch.dtype) -> None:
    experts = {f"{number}.{kind}": random_weight(30, 70, dtype, number) for number in range(5) for kind in "ab"}
    entries = checkpoint_of(tmp_path, experts)
    requests = [
        TensorRequest(
            entries[f"{number}.{kind}"],
            GPU,
            becomes=ToDtype(to),
            part=Part("fused", (5, 60, 70), (number * 60 + row) * 70),
        )
        for kind, row in (("a", 0), ("b", 30))
        for number in range(5)
    ]
    made = pour(driver, requests)
    expected = torch.stack([torch.cat([experts[f"{n}.a"], experts[f"{n}.b"]]) for n in range(5)]).to(to)
    wholes = {id(found.tensor): found.tensor for found in made.values() if found is not None}
    (fused,) = wholes.values()
    assert torch.equal(fused, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_int8_experts(driver: FakeDriver, tmp_path: Path, transposed: bool) -> None:
    """As each alone; entries are elements of a stack, or tensors of their own."""
    shape = (70, 30) if transposed else (30, 70)
    weights = {f"{number}": random_weight(*shape, torch.bfloat16, number) for number in range(5)}
    entries = checkpoint_of(tmp_path, {"stack": torch.stack(list(weights.values()))})
    each = [entries["stack"].element(number) for number in range(5)]
    becomes = ToInt8(torch.bfloat16, transposed)
    alone = pour(driver, [TensorRequest(entry, GPU, becomes=becomes) for entry in each])
    placed = [
        TensorRequest(entry, GPU, becomes=becomes, part=Part("fused", (5, 30, 70), number * 2100))
        for number, entry in enumerate(each)
    ]
    whole, *_ = pour(driver, placed).values()
    assert whole is not None
    assert whole.scales is not None
    assert whole.scales.shape == (5, 30)
    for number, entry in enumerate(each):
        one = alone[entry.name]
        assert one is not None
        assert torch.equal(whole.tensor[number], one.tensor)
        assert torch.equal(whole.scales[number], one.scales)


@pytest.mark.parametrize("most_bytes", [1, 1000, 10**9])
def test_parts_are_released_together(driver: FakeDriver, tmp_path: Path, most_bytes: int) -> None:
    names = [f"{layer}.{number}" for layer in range(4) for number in range(5)]
    entries = checkpoint_of(
        tmp_path, {name: random_weight(30, 70, torch.float16, seed) for seed, name in enumerate(names)}
    )
    requests = [
        TensorRequest(
            entries[name], GPU, becomes=ToDtype(torch.float16), part=Part(name[0], (150, 70), int(name[2]) * 2100)
        )
        for name in names
    ]
    transport = Transport(OPTIONS, driver.lane)
    stream = TensorStream(requests, transport, quantizer=driver.quantizer, most_bytes=most_bytes)
    for layer in range(4):
        parts = [name for name in names if name.startswith(f"{layer}.")]
        whole, *_ = [stream.made(name) for name in parts]
        assert whole is not None
        stream.wait(parts)
        driver.synchronize(0)
        expected = torch.cat([random_weight(30, 70, torch.float16, names.index(name)) for name in parts])
        assert torch.equal(whole.tensor, expected)
        stream.release(parts)
    stream.finish()
    transport.close()
    stream.close()


@pytest.mark.parametrize("becomes", [ToInt8(torch.float16), ToDtype(torch.float16)], ids=str)
def test_the_memory_of_a_whole_counts_when_it_is_taken(
    driver: FakeDriver, tmp_path: Path, becomes: ToInt8 | ToDtype
) -> None:
    names = [f"{layer}.{number}" for layer in range(4) for number in range(5)]
    entries = checkpoint_of(tmp_path, {name: random_weight(30, 70, torch.float16) for name in names})
    requests = [
        TensorRequest(entries[name], GPU, becomes=becomes, part=Part(name[0], (150, 70), int(name[2]) * 2100))
        for name in names
    ]
    one = sum(request.final_bytes for request in requests[:5])
    assert one == requests[0].allocated_bytes
    transport = Transport(OPTIONS, driver.lane)
    stream = TensorStream(requests, transport, quantizer=driver.quantizer, most_bytes=one + one // 2)
    assert set(stream._pours[names[0]]._wholes) == {"0"}
    for name in names:
        stream.made(name)
    stream.finish()
    transport.close()
    stream.close()


def test_a_tensor_of_which_one_part_cannot_be_poured_is_left_whole(driver: FakeDriver, tmp_path: Path) -> None:
    """Its other parts would land in a tensor of which that one would know nothing."""
    weights = {f"{layer}.{number}": random_weight(30, 70, torch.bfloat16) for layer in range(2) for number in range(3)}
    weights["0.1"] = weights["0.1"].double()  # none of the kernels' dtypes
    entries = checkpoint_of(tmp_path, weights)
    requests = [
        TensorRequest(
            entry, GPU, True, becomes=ToInt8(torch.bfloat16), part=Part(name[0], (3, 30, 70), int(name[2]) * 2100)
        )
        for name, entry in sorted(entries.items())
    ]
    with open_stream(requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer) as stream:
        assert [name for name in entries if stream.makes(name)] == ["1.0", "1.1", "1.2"]
        assert [name for name in entries if stream.lands_in_place(name)] == ["1.0", "1.1", "1.2"]
        whole = stream.made_of_parts(["1.0", "1.1", "1.2"])
        assert whole.tensor.shape == (3, 30, 70)
        for name in ("0.0", "0.1", "0.2"):
            assert sum(len(band) for _, band in stream.bands(name)) == 30
        stream.finish()
