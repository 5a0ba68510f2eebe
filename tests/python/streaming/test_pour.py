"""What the GPU's consumer makes of requests, over the fake driver: as torch would, byte for byte.

What is made must outlive the stream here: the fake's memory is not given back in the order of a GPU's stream.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver, driver
from pours import DTYPES, GPU, OPTIONS, checkpoint_of, pour, quantized, random_weight
from streams import unstamped

from pyint8 import _core
from pyint8.errors import TruncatedError
from pyint8.streaming.made import Made
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToDtype, ToInt8
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

__all__ = ["driver"]  # a fixture

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_to_int8(
    driver: FakeDriver, tmp_path: Path, dtype: torch.dtype, model_dtype: torch.dtype, transposed: bool
) -> None:
    sizes = {"one": (1, 1), "odd": (611, 33), "bands": (700, 300), "wide": (3, 1999)}
    weights = {name: random_weight(*shape, dtype, seed) for seed, (name, shape) in enumerate(sizes.items())}
    entries = checkpoint_of(tmp_path, weights)
    requests = [TensorRequest(entry, GPU, True, becomes=ToInt8(model_dtype, transposed)) for entry in entries.values()]
    made = pour(driver, requests)
    for name, weight in weights.items():
        half = weight.to(model_dtype).to(torch.float16)
        codes, scales = quantized(half.T.contiguous() if transposed else half)
        found = made[name]
        assert found is not None
        assert found.scales is not None
        assert found.marks is not None
        assert torch.equal(found.tensor, codes)
        assert torch.equal(found.scales, scales)
        assert not found.marks.any()


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_cast(driver: FakeDriver, tmp_path: Path, dtype: torch.dtype, to: torch.dtype) -> None:
    tensors = {"matrix": random_weight(100, 321, dtype), "vector": random_weight(1, 9999, dtype)[0]}
    tensors["scalar"] = torch.tensor(0.3, dtype=dtype)
    entries = checkpoint_of(tmp_path, tensors)
    made = pour(driver, [TensorRequest(entry, GPU, becomes=ToDtype(to)) for entry in entries.values()])
    for name, tensor in tensors.items():
        found = made[name]
        assert found is not None
        assert torch.equal(found.tensor, tensor.to(to))
        assert (found.marks is not None) == (to == torch.float16 != dtype)


def test_what_stays_as_stored_may_be_of_any_dtype(driver: FakeDriver, tmp_path: Path) -> None:
    tensors = {"codes": torch.arange(-100, 100).to(torch.int8).view(10, 20), "numbers": torch.arange(12345)}
    entries = checkpoint_of(tmp_path, tensors)
    made = pour(driver, [TensorRequest(e, GPU, becomes=ToDtype(e.torch_dtype)) for e in entries.values()])
    assert all(found is not None and torch.equal(found.tensor, tensors[name]) for name, found in made.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 70000.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_int8_cannot_hold_are_marked(
    driver: FakeDriver, tmp_path: Path, bad: float, transposed: bool
) -> None:
    weight = random_weight(300, 200, torch.bfloat16)
    weight[123, 45] = bad
    entries = checkpoint_of(tmp_path, {"bad": weight, "good": random_weight(50, 60, torch.bfloat16)})
    becomes = ToInt8(torch.bfloat16, transposed)
    made = pour(driver, [TensorRequest(entry, GPU, True, becomes=becomes) for entry in entries.values()])
    assert made["bad"] is not None
    assert made["good"] is not None
    assert made["bad"].marks is not None
    assert made["good"].marks is not None
    assert made["bad"].marks.nonzero().flatten().tolist() == [45 if transposed else 123]
    assert not made["good"].marks.any()


def test_only_new_infinity_is_marked_in_values(driver: FakeDriver, tmp_path: Path) -> None:
    values = {"new": torch.tensor([1.0, 1e6]), "old": torch.tensor([1.0, float("inf"), float("nan")])}
    entries = checkpoint_of(tmp_path, values)
    made = pour(driver, [TensorRequest(entry, GPU, becomes=ToDtype(torch.float16)) for entry in entries.values()])
    marks = {name: found.marks.tolist() for name, found in made.items() if found and found.marks is not None}
    assert marks == {"new": [1], "old": [0]}


def test_in_whatever_order(driver: FakeDriver, tmp_path: Path) -> None:
    weights = {f"{number:03}": random_weight(90, 70, torch.bfloat16, number) for number in range(100)}
    entries = checkpoint_of(tmp_path, weights)
    requests = [TensorRequest(e, GPU, True, becomes=ToInt8(torch.bfloat16)) for e in entries.values()]
    with open_stream(requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer) as stream:
        made = {name: stream.made(name) for name in reversed(weights)}
        stream.finish()
    for name, weight in weights.items():
        found = made[name]
        assert found is not None
        assert torch.equal(found.tensor, quantized(weight.half())[0])


@pytest.mark.parametrize("keep", [0, 3])
def test_only_so_much_is_made_before_it_is_released(driver: FakeDriver, tmp_path: Path, keep: int) -> None:
    weights = {f"{number:03}": random_weight(90, 70, torch.bfloat16, number) for number in range(100)}
    entries = checkpoint_of(tmp_path, weights)
    requests = [TensorRequest(e, GPU, True, becomes=ToInt8(torch.bfloat16)) for e in entries.values()]
    transport = Transport(OPTIONS, driver.lane)
    stream = TensorStream(requests, transport, quantizer=driver.quantizer, most_bytes=5 * requests[0].final_bytes)
    taken: dict[str, Made] = {}
    for name in weights:
        made = stream.made(name)
        assert made is not None
        stream.wait([name])
        taken[name] = made
        if len(taken) > keep:
            oldest = next(iter(taken))
            stream.release([oldest])
            driver.synchronize(0)
            assert torch.equal(taken.pop(oldest).tensor, quantized(weights[oldest].half())[0])
        assert len(transport._in_use) <= 2 + 2 * 6  # scratch, and codes and scales
    stream.finish()
    transport.close()
    assert transport.stats()["bytes_delivered"] == sum(weight.nbytes for weight in weights.values())
    stream.close()


def test_of_tensors_above_the_bound_one_is_there_at_a_time(driver: FakeDriver, tmp_path: Path) -> None:
    tensors = {
        f"{number}": random_weight(200 if number in (0, 1, 5) else 10, 70, DTYPES[1], number) for number in range(8)
    }
    entries = checkpoint_of(tmp_path, tensors)
    requests = [TensorRequest(entry, GPU, becomes=ToDtype(torch.bfloat16)) for entry in entries.values()]
    transport = Transport(OPTIONS, driver.lane)
    largest = max(request.final_bytes for request in requests)
    stream = TensorStream(requests, transport, quantizer=driver.quantizer, most_bytes=largest // 3)
    for name, tensor in tensors.items():
        made = stream.made(name)
        assert made is not None
        stream.wait([name])
        driver.synchronize(0)
        scratch, *held = transport._in_use.values()
        assert scratch.nbytes == OPTIONS.device_scratch
        assert sum(memory.nbytes for memory in held) <= largest + largest // 3
        assert torch.equal(made.tensor, tensor)
        stream.release([name])
    stream.finish()
    transport.close()
    stream.close()


def test_what_it_cannot_make_comes_by_the_other_road(driver: FakeDriver, tmp_path: Path) -> None:
    tensors = {"double": torch.rand(30, 40).double(), "wide": random_weight(2, 30000, torch.float32)}
    tensors["fine"] = random_weight(30, 40, torch.float32)
    entries = checkpoint_of(tmp_path, tensors)
    requests = [TensorRequest(entry, GPU, True, becomes=ToInt8(torch.float16)) for entry in entries.values()]
    made = pour(driver, requests)
    assert [name for name, found in made.items() if found is not None] == ["fine"]
    with open_stream(requests, OPTIONS, opener=driver.lane) as stream:
        assert not any(stream.made(name) for name in tensors)


def test_a_consumer_that_does_not_open_is_one_warning(
    driver: FakeDriver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = checkpoint_of(tmp_path, {"weight": random_weight(30, 40, torch.float16)})
    driver.fail("cuStreamCreate", 2, 999)  # the first is the copy stream
    with caplog.at_level(logging.WARNING, "pyint8"):
        made = pour(driver, [TensorRequest(e, GPU, True, becomes=ToInt8(torch.float16)) for e in entries.values()])
    assert made == {"weight": None}
    (record,) = caplog.records
    assert "quantized by Python operators, more slowly: cuStreamCreate" in record.getMessage()


def test_a_build_without_kernels_says_so_once(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = checkpoint_of(tmp_path, {f"{n}": random_weight(30, 40, torch.float16) for n in range(3)})
    monkeypatch.setattr(_core, "has_kernels", lambda: False)
    for device in (GPU, torch.device("cpu")):
        with caplog.at_level(logging.WARNING, "pyint8"):
            made = pour(
                driver, [TensorRequest(e, device, True, becomes=ToInt8(torch.float16)) for e in entries.values()]
            )
        assert made == dict.fromkeys(entries)
    (record,) = caplog.records
    assert record.getMessage().startswith("this build of pyint8 has no GPU kernels, so weights on ")


def test_a_file_that_is_too_short_names_the_tensor(driver: FakeDriver, tmp_path: Path) -> None:
    weights = {name: random_weight(90, 70, torch.bfloat16) for name in ("first", "second", "third")}
    entries = unstamped(checkpoint_of(tmp_path, weights))
    requests = [TensorRequest(e, GPU, True, becomes=ToInt8(torch.bfloat16)) for e in entries.values()]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(entries["second"].offset + 1000)
    with pytest.raises(TruncatedError) as caught:
        pour(driver, requests)
    assert caught.value.tensor == "second"


def test_weights_that_nobody_takes_are_given_back(driver: FakeDriver, tmp_path: Path) -> None:
    weights = {f"{number:03}": random_weight(90, 70, torch.bfloat16, number) for number in range(100)}
    entries = checkpoint_of(tmp_path, weights)
    requests = [TensorRequest(e, GPU, True, becomes=ToInt8(torch.bfloat16)) for e in entries.values()]
    with open_stream(requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer) as stream:
        kept = stream.made("003")
    assert kept is not None


def test_what_nobody_closes_is_closed_when_it_goes(driver: FakeDriver, tmp_path: Path) -> None:
    weights = {f"{number:03}": random_weight(90, 70, torch.bfloat16, number) for number in range(100)}
    entries = checkpoint_of(tmp_path, weights)
    requests = [TensorRequest(e, GPU, True, becomes=ToInt8(torch.bfloat16)) for e in entries.values()]
    transport = Transport(OPTIONS, driver.lane)
    stream = TensorStream(requests, transport, quantizer=driver.quantizer)
    assert stream.made("000") is not None  # and is dropped, while it may not have come
    assert len(transport._in_use) == 2 + 2 * len(weights)
    del stream, transport  # the driver's fixture sees that nothing is left
