"""The engine on a real device: bytes, bands, the kernel, and that everything is given back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import TruncatedError
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest

CUDA = torch.device("cuda", 0)


def equal_bytes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu().contiguous().view(-1).view(torch.uint8)

    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(as_bytes(ours), as_bytes(theirs))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(), (1,), (3, 5), (4099, 257), (1, 70001), (2500, 1600), (0, 7)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return {
        f"t{number}_{dtype}": torch.randn(shape, generator=generator).to(dtype)
        for number, shape in enumerate(shapes)
        for dtype in dtypes
    }


@pytest.mark.parametrize(
    "options",
    [
        StreamOptions(),
        StreamOptions(threads=1, slots_per_thread=1, slot_bytes=8192, device_scratch=1 << 20),
        StreamOptions(threads=13, slots_per_thread=2, slot_bytes=65536, device_scratch=3 << 20),
        StreamOptions(threads=4, direct_io=True),
    ],
    ids=["default", "tiny", "odd", "direct"],
)
@pytest.mark.parametrize("in_bands", [False, True])
def test_every_byte_arrives(
    tmp_path: Path, tensors: dict[str, torch.Tensor], options: StreamOptions, in_bands: bool
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    deliveries = [TensorRequest(entry, CUDA, in_bands=in_bands) for entry in checkpoint.entries.values()]
    with open_stream(deliveries, options) as stream:
        for name in checkpoint:
            landed = stream.whole(name)
            assert landed.is_cuda
            assert equal_bytes(landed, tensors[name]), name
    assert _core.pinned_bytes_in_use() == 0


def test_scratch_is_reused_only_after_use(tmp_path: Path) -> None:
    """Slow work on a band must not see the bytes of a later one."""
    weights = {f"w{i}": torch.full((512, 1024), i, dtype=torch.float16) for i in range(64)}
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    deliveries = [TensorRequest(checkpoint[name], CUDA, in_bands=True) for name in weights]
    sums = {}
    with open_stream(deliveries, StreamOptions(device_scratch=4 << 20)) as stream:
        for name in weights:
            for row, band in stream.bands(name):
                torch.cuda._sleep(2_000_000)
                sums[name, row] = (band.float().min(), band.float().max())
    for (name, _), (low, high) in sums.items():
        assert low == high == int(name[1:])


def test_the_callers_own_work_comes_first(tmp_path: Path) -> None:
    """Memory that torch hands out again may still be read by kernels in flight: a copy into it has to wait."""
    save_file({"w": torch.full((4 << 20,), 7, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for _ in range(20):
        old = torch.zeros(4 << 20, dtype=torch.uint8, device=CUDA)
        torch.cuda._sleep(20_000_000)
        seen = old.max()
        del old
        with open_stream([TensorRequest(checkpoint["w"], CUDA)], StreamOptions()) as stream:
            assert int(stream.whole("w").min()) == 7
        assert int(seen) == 0


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (64, 64), (1600, 4800), (100, 70001), (70001, 3)])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernel_turns_as_torch_does(
    tmp_path: Path, shape: tuple[int, int], stored: torch.dtype, model_dtype: torch.dtype
) -> None:
    assert _core.has_kernels()
    weight = (torch.randn(shape) * torch.randn(shape).exp().exp()).to(stored)
    weight.view(-1)[:: max(1, weight.numel() // 7)] = 6.1e-8  # subnormal in fp16
    save_file({"w": weight}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    options = StreamOptions(device_scratch=1 << 20)
    with open_stream([TensorRequest(checkpoint["w"], CUDA, in_bands=True)], options) as stream:
        transposed = stream.transposed_half("w", model_dtype)
    assert equal_bytes(transposed, weight.to(model_dtype).to(torch.float16).T)


def test_a_cut_file_is_told_and_everything_given_back(tmp_path: Path) -> None:
    save_file({f"w{i}": torch.randn(1 << 20) for i in range(8)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    cut = checkpoint["w5"].offset + 1234
    os.truncate(checkpoint.files[0], cut)
    threads = len(os.listdir("/proc/self/task"))
    entries = [replace(entry, stamp=None) for entry in checkpoint.values()]  # of the file in whatever state
    requests = [TensorRequest(entry, CUDA) for entry in entries]
    with pytest.raises(TruncatedError) as caught, open_stream(requests, StreamOptions()) as stream:
        _ = [stream.whole(name) for name in checkpoint]
    assert (caught.value.tensor, caught.value.path, caught.value.offset) == ("w5", checkpoint.files[0], cut)
    assert _core.pinned_bytes_in_use() == 0
    assert len(os.listdir("/proc/self/task")) <= threads
    assert not any("model.safetensors" in os.readlink(f"/proc/self/fd/{fd}") for fd in _open_descriptors())


def _open_descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
