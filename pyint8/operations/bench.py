"""How fast loads are on this machine, beside what the bus, the page cache and the disk give: `pyint8 bench`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint.writer import SafetensorsWriter, TensorPlan
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import OptionError, ReadError
from pyint8.host.files import open_file
from pyint8.host.imports import importing
from pyint8.host.memory import available_memory
from pyint8.host.page_cache import is_cached
from pyint8.host.removal import discard_folder
from pyint8.host.speed import drop_from_cache, read_by_threads, takes_direct_reads
from pyint8.host.writing import write_errors
from pyint8.operations.common import decoded
from pyint8.operations.load import load
from pyint8.report import readable_size

if TYPE_CHECKING:
    import torch

_FOR_A_GPU = 1 << 30
_FOR_A_CPU = 256 << 20
_LEAST = 8 << 20
_WIDTHS = (4096, 1024)  # of the weights; the wider where there are eight of them
_BYTES_OF_BFLOAT16 = 2
_PASSES = 3


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Attributes:
        name: What was measured.
        gigabytes_per_second: The best of a few; None where it cannot be measured here.
        note: How, or why not.
    """

    name: str
    gigabytes_per_second: float | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


def bench(folder: str | os.PathLike[str] | None = None, nbytes: int | str | None = None) -> Iterator[Speed]:
    """Measures, one thing after the other; less than a minute where a disk gives 0.1 GB/s.

    Args:
        folder: Where a checkpoint of random weights is written, and removed at the end; None for the system's own
            folder for such files.
        nbytes: How large it is, in bytes or as a size such as "1GiB"; None for 1 GiB with a GPU, 256 MiB without.

    Raises:
        OptionError: A size that cannot be used.
        WriteError: It cannot be written.
    """
    with importing:
        import torch
    where = tempfile.gettempdir() if folder is None else decoded(folder)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    size = _checked(nbytes, where, _FOR_A_CPU if device.type == "cpu" else _FOR_A_GPU)
    with write_errors(where):
        scratch = tempfile.mkdtemp(prefix="pyint8-bench-", dir=where)
    try:
        yield from _measure(_Weights(scratch, size), device)
    finally:
        discard_folder(scratch)


def _checked(nbytes: int | str | None, folder: str, usual: int) -> int:
    from pyint8.placement.budget import size_in_bytes

    if not os.path.isdir(folder):
        raise OptionError(f"folder is {folder!r}, which is no folder; give one with some free space")
    room = min(shutil.disk_usage(folder).free // 2, available_memory() // 2)
    if nbytes is None:
        return max(_LEAST, min(usual, room))
    size = int(size_in_bytes("size", nbytes))
    if not _LEAST <= size <= room:
        possible = f"from {readable_size(_LEAST)} to {readable_size(room)}, half of what is free on disk and in memory"
        raise OptionError(f"size is {nbytes!r}; here it can be {possible}")
    return size


class _Weights:
    """A checkpoint of random bf16 weights, and a module for them."""

    def __init__(self, folder: str, nbytes: int) -> None:
        self.path = os.path.join(folder, "model.safetensors")
        wide, narrow = _WIDTHS
        self.width = wide if nbytes >= 8 * wide * wide * _BYTES_OF_BFLOAT16 else narrow
        self.count = nbytes // (self.width * self.width * _BYTES_OF_BFLOAT16)
        self.nbytes = self.count * self.width * self.width * _BYTES_OF_BFLOAT16
        self._write()

    def _write(self) -> None:
        import torch

        weight = torch.randn(self.width, self.width, generator=torch.Generator().manual_seed(0)).bfloat16()
        raw = weight.view(torch.uint8).numpy().data.cast("B")
        plans = [TensorPlan(f"{number}.weight", "BF16", tuple(weight.shape)) for number in range(self.count)]
        with SafetensorsWriter(self.path, plans, {"format": "pt"}) as writer:
            for plan in plans:
                writer.write(plan.name, [raw])
            writer.sync()

    def module(self) -> torch.nn.Module:
        from torch import nn

        shape = {"in_features": self.width, "out_features": self.width, "bias": False}
        return nn.ModuleList(nn.Linear(**shape, device="meta") for _ in range(self.count))  # type: ignore[arg-type]


def _measure(weights: _Weights, device: torch.device) -> Iterator[Speed]:
    from pyint8.streaming.speed import engine_speed

    options = StreamOptions.from_environment()
    threads = options.worker_threads()
    yield _disk(weights.path, threads)
    yield _bus(device)
    speed = _best(lambda: read_by_threads([weights.path], threads))
    yield Speed("page cache", speed, f"{threads} threads read {readable_size(weights.nbytes)}")
    where = "the GPU" if device.type == "cuda" else "host memory"
    moved = engine_speed(weights.path, weights.nbytes, device, options)
    yield Speed("engine", moved, f"from the page cache into {where}")
    loaded = _best(lambda: _load(weights, device))
    yield Speed("load", loaded, f"pyint8.load of {weights.count} bf16 weights to int8 on {device}")


def _best(measure: Callable[[], float]) -> float:
    return max(measure() for _ in range(_PASSES))


def _disk(path: str, threads: int) -> Speed:
    drop_from_cache(path)
    is_direct = takes_direct_reads(path)
    if not is_direct:
        with open_file(path) as file:
            if is_cached(file.fileno(), 0):
                return Speed("disk", None, "the file system keeps files in memory, and takes no direct reads")
    try:
        speed = read_by_threads([path], threads, direct=is_direct)
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror or error}", path=path, errno=error.errno) from error
    return Speed("disk", speed, "direct reads" if is_direct else "a cold file; no direct reads here")


def _bus(device: torch.device) -> Speed:
    from pyint8.streaming.speed import bus_speed

    if device.type == "cpu":
        return Speed("bus", None, "torch finds no GPU here")
    return Speed("bus", bus_speed(device.index), "one copy from pinned memory")


def _load(weights: _Weights, device: torch.device) -> float:
    _, report = load(
        weights.path,
        {"": device},
        model=weights.module(),
        config=Int8Config(skip_modules=[]),
        progress=False,
        return_report=True,
    )
    assert report.tensors["int8"] == weights.count
    return report.gigabytes_per_second
