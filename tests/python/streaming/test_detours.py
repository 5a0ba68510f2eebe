"""Loads onto one GPU over other GPUs' buses, over the fake driver: the same bytes, and nothing is kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver, driver
from local_ranks import on_ranks
from safetensors.torch import save_file

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import OptionError
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToDtype, ToInt8
from pyint8.streaming.transport import Transport

__all__ = ["driver"]  # a fixture

OPTIONS = StreamOptions(threads=4, slot_bytes=8192, device_scratch=1 << 20, borrow_gpus=(1,))


@pytest.fixture
def asked(tmp_path: Path) -> list[TensorRequest]:
    tensors = {f"{number}": torch.randn(300, 256).bfloat16() for number in range(4)} | {
        "as stored": torch.arange(99_999)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    entries = open_checkpoint(tmp_path / "model.safetensors")
    ways = {"as stored": ToDtype(torch.int64)}
    gpu = torch.device("cuda", 0)
    return [TensorRequest(entries[name], gpu, becomes=ways.get(name, ToInt8(torch.bfloat16))) for name in tensors]


def calls(driver: FakeDriver) -> int:
    return int(driver._library.fake_cuda_calls(b"cuMemAlloc_v2"))


def made(driver: FakeDriver, asked: list[TensorRequest], options: StreamOptions) -> list[bytes]:
    options = replace(options, libcuda=driver.path)
    with open_stream(asked, options, opener=driver.lane, quantizer=driver.quantizer) as stream:
        for detours in stream._transport._detours:
            detours.join()
        found = [stream.made(request.entry.name) for request in asked]
        stream.finish()
        driver.synchronize(0)
        return [each.tensor.numpy().tobytes() for each in found if each is not None]


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
@pytest.mark.parametrize("neighbours", [(1,), (2, 1), (0, 1)])
def test_the_same_bytes_come(driver: FakeDriver, asked: list[TensorRequest], neighbours: tuple[int, ...]) -> None:
    alone = made(driver, asked, replace(OPTIONS, borrow_gpus=()))
    assert calls(driver) == 0
    assert made(driver, asked, replace(OPTIONS, borrow_gpus=neighbours)) == alone
    assert calls(driver) == len(set(neighbours) - {0})


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
def test_a_gpu_that_cannot_is_left_out_with_a_warning(
    driver: FakeDriver, asked: list[TensorRequest], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pyint8"):
        found = made(driver, asked, replace(OPTIONS, borrow_gpus=(3, 1)))
    assert found == made(driver, asked, OPTIONS)
    assert [record.getMessage() for record in caplog.records] == [
        "no bytes for GPU 0 take the bus of GPU 3: GPU 3 cannot write to the memory of GPU 0"
    ]


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
def test_memory_that_is_refused_is_a_warning(
    driver: FakeDriver, asked: list[TensorRequest], caplog: pytest.LogCaptureFixture
) -> None:
    alone = made(driver, asked, replace(OPTIONS, borrow_gpus=()))
    driver.fail("cuMemAlloc_v2", 1, 2)
    with caplog.at_level(logging.WARNING, "pyint8"):
        assert made(driver, asked, OPTIONS) == alone
    assert "take the bus of GPU 1: cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY" in caplog.text


@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
def test_a_gpu_that_is_full_is_left_out_alone(
    driver: FakeDriver, asked: list[TensorRequest], caplog: pytest.LogCaptureFixture
) -> None:
    alone = made(driver, asked, replace(OPTIONS, borrow_gpus=()))
    driver.fail("cuMemAlloc_v2", 2, 2)
    with caplog.at_level(logging.WARNING, "pyint8"):
        assert made(driver, asked, replace(OPTIONS, borrow_gpus=(2, 3, 1))) == alone
    told = [record.getMessage() for record in caplog.records]
    assert [message.partition(", said")[0] for message in told] == [
        "no bytes for GPU 0 take the bus of GPU 3: GPU 3 cannot write to the memory of GPU 0",
        "no bytes for GPU 0 take the bus of GPU 1: cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY",
    ]


def test_a_thread_that_is_refused_is_a_warning(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    transport = Transport(replace(OPTIONS, libcuda=driver.path), driver.lane)
    with caplog.at_level(logging.WARNING, "pyint8"):
        transport.lane(torch.device("cuda", 0))
    transport.close()
    assert "no bytes for GPU 0 take the bus of GPU 1: can't start new thread" in caplog.text


def test_a_load_that_ends_at_once_gives_all_back(driver: FakeDriver) -> None:
    for _ in range(10):
        transport = Transport(replace(OPTIONS, libcuda=driver.path), driver.lane)
        transport.lane(torch.device("cuda", 0))
        transport.close()
        assert driver.counters()["device_bytes"] == driver.counters()["peer_accesses"] == 0


def test_several_gpus_and_ranks_have_no_use_for_it(driver: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    def open_lane(ranks: Ranks, _: int) -> None:
        transport = ranks.transport(OPTIONS, driver.lane)
        transport.lane(torch.device("cuda", 0))
        transport.close()

    with caplog.at_level(logging.WARNING, "pyint8"):
        transport = Transport(replace(OPTIONS, libcuda=driver.path), driver.lane, gpus=2)
        transport.lane(torch.device("cuda", 0))
        transport.close()
        on_ranks(2, open_lane)
    assert len(caplog.records) == 3
    assert all("borrow_gpus is for loads onto one GPU by one process" in record.message for record in caplog.records)
    assert calls(driver) == 0


def test_the_cpu_has_no_use_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"one": torch.ones(3), "two": torch.ones(5)}, tmp_path / "model.safetensors")
    entries = open_checkpoint(tmp_path).values()
    requests = [TensorRequest(entry, torch.device("cpu")) for entry in entries]
    with open_stream(requests, OPTIONS) as stream:
        assert [float(stream.whole(entry.name).sum()) for entry in entries] == [3.0, 5.0]
    transport = Transport(OPTIONS)  # as for one device, before it is known which
    transport.lane(torch.device("cpu"))
    transport.close()
    transport.close()
    says = "borrow_gpus is for loads onto one GPU by one process: here it has no effect"
    assert [record.message for record in caplog.records] == [says, says]


def test_staging_memory_has_a_limit() -> None:
    options = replace(OPTIONS, threads=64, slots_per_thread=4, slot_bytes=4 << 20, borrow_gpus=(1, 2, 3))
    with pytest.raises(OptionError, match=r"borrow_gpus could take 536870912 bytes of a GPU, 134217728 at most"):
        Transport(options).close()
