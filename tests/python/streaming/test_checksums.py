"""Checksums of tensors on their way from files and to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checksums import add_checksums, crc32c, damage
from fake_driver import FakeDriver, driver
from safetensors.torch import save_file
from streams import CPU, MIXED, TINY, requests, write

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import ChecksumError, OptionError
from pyint8.streaming.checksums import Checksums
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest, ToDtype, ToInt8

__all__ = ["driver"]  # a fixture

GPU = torch.device("cuda", 0)
# Bands of 128 KiB.
OPTIONS = StreamOptions(threads=3, slot_bytes=8192, device_scratch=1 << 20)


def test_pieces_that_go_by() -> None:
    checksums = Checksums({"known": 5})
    pieces = [memoryview(b"1234"), memoryview(b"5"), memoryview(b"6789")]
    assert list(checksums.noting("a", pieces)) == pieces
    assert checksums.of == {"known": 5, "a": 0xE3069283}
    assert _core.crc32c(b"12345") == crc32c(b"12345")


def test_only_bytes_in_a_row(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not contiguous"):
        _core.crc32c(memoryview(bytes(10))[::2])


@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("name", [name for name, (_, shape) in MIXED.items() if 0 not in shape])
def test_in_host_memory(name: str, in_bands: bool, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", MIXED)
    checkpoint = add_checksums(tmp_path)
    with open_stream(requests(checkpoint, in_bands=in_bands), TINY) as stream:
        for each in checkpoint:
            stream.whole(each)
    damage(checkpoint[name], checkpoint[name].nbytes - 1)
    alone = [TensorRequest(open_checkpoint(tmp_path)[name], CPU, in_bands)]
    with pytest.raises(ChecksumError) as caught, open_stream(alone, TINY) as stream:
        stream.whole(name)
    assert (caught.value.tensor, caught.value.offset) == (name, checkpoint[name].offset)


@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("how", ["int8", "transposed", "cast", "as stored", "batched"])
@pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")
def test_on_their_way_to_a_gpu(driver: FakeDriver, tmp_path: Path, how: str, in_bands: bool) -> None:
    """By whatever road: what is sound comes, and what is not does not."""
    weights = {f"{number}": torch.randn(700, 300).to(torch.bfloat16) for number in range(3)}
    save_file(weights, tmp_path / "model.safetensors")
    becomes = {
        "int8": ToInt8(torch.bfloat16),
        "transposed": ToInt8(torch.bfloat16, transposed=True),
        "cast": ToDtype(torch.float16),
        "as stored": ToDtype(torch.bfloat16),
        "batched": None,
    }[how]
    batch = "all" if how == "batched" and not in_bands else None

    def read() -> None:
        requests = [
            TensorRequest(entry, GPU, in_bands, batch, becomes)
            for entry in open_checkpoint(tmp_path / "model.safetensors").values()
        ]
        with open_stream(requests, OPTIONS, opener=driver.lane, quantizer=driver.quantizer) as stream:
            made = [stream.made(name) or stream.whole(name) for name in weights]
            stream.finish()
            assert len(made) == 3

    checkpoint = add_checksums(tmp_path)
    read()
    damage(checkpoint["1"], 100_000)
    with pytest.raises(ChecksumError) as caught:
        read()
    assert (caught.value.tensor, caught.value.offset) == ("1", checkpoint["1"].offset)
