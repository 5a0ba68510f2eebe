"""What of this machine would hold a load back, or keep it from working, and how to mend it: `pyint8 doctor`.

What needs torch comes last: the first findings are there in a moment, and also where torch is broken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pyint8.errors import Pyint8Error
from pyint8.host.gpus import LEAST_DRIVER, Gpu, gpus, gpus_on_the_bus
from pyint8.operations.common import decoded
from pyint8.operations.machine import look_at_machine, look_at_packages, look_at_storage
from pyint8.report import readable_size
from pyint8.report.finding import Finding

# A bus that is slower than this part of what its lanes give is worth a look; packets' headers take a tenth.
_GOOD_BUS = 0.7
_NO_TORCH = "`pip install torch` as https://pytorch.org says for this machine"


def examine(path: str | os.PathLike[str] | None = None) -> Iterator[Finding]:
    """Looks at this machine, one thing after the other.

    Args:
        path: A checkpoint's folder or file, whose storage is measured by reading some of it.

    Raises:
        OptionError: `path` is none.
        ReadError: There is nothing at `path`.
    """
    folder = None if path is None else decoded(path)
    yield from look_at_packages()
    yield from look_at_machine()
    found = gpus()
    yield from _look_at_gpus(found)
    if folder is not None:
        yield from look_at_storage(folder)
    yield _kernels()
    torch = _torch(found)
    yield torch
    if torch.state != "broken":
        yield _entry_point()
        yield from (_bus(ordinal, _described(ordinal, found)) for ordinal in range(torch.facts["gpus"]))


def _look_at_gpus(found: list[Gpu]) -> Iterator[Finding]:
    if not found:
        yield _no_gpu()
    for gpu in found:
        yield _driver(gpu)
        if gpu.link is not None:
            yield _link(gpu)


def _no_gpu() -> Finding:
    count = gpus_on_the_bus()
    if not count:
        return Finding("GPU", "ok", "none: weights are quantized on the CPU", {"on_bus": 0})
    return Finding(
        "GPU",
        "broken",
        f"{count} of NVIDIA on the bus, and nvidia-smi finds none",
        {"on_bus": count},
        "models are loaded onto the CPU",
        f"install NVIDIA's driver, {LEAST_DRIVER} or later; in a container, start it with the GPUs (`--gpus all`)",
    )


def _driver(gpu: Gpu) -> Finding:
    free = "" if gpu.free_bytes is None else f", {readable_size(gpu.free_bytes)} free"
    value = f"{gpu.name}{free}, driver {gpu.driver}"
    facts = {"name": gpu.name, "driver": gpu.driver, "memory": gpu.memory_bytes, "free": gpu.free_bytes}
    if gpu.has_old_driver:
        mend = f"install a driver of {LEAST_DRIVER} or later"
        return Finding(f"GPU {gpu.index}", "broken", value, facts, "the engine does not open it", mend)
    return Finding(f"GPU {gpu.index}", "ok", value, facts)


def _link(gpu: Gpu) -> Finding:
    link = gpu.link
    assert link is not None
    value = f"PCIe {link.generation} x{link.width} now, PCIe {link.most_generation} x{link.most_width} at most"
    facts = {
        "generation": link.generation,
        "most_generation": link.most_generation,
        "width": link.width,
        "most_width": link.most_width,
        "gigabytes_per_second": link.gigabytes_per_second,
    }
    if link.width < link.most_width:
        consequence = f"the bus gives {link.width / link.most_width:.0%} of what the GPU could take"
        mend = "put the GPU into a slot with all lanes, seat it again, or see the firmware's bifurcation of slots"
        return Finding(f"link of GPU {gpu.index}", "slow", value, facts, consequence, mend)
    return Finding(f"link of GPU {gpu.index}", "ok", value, facts)


def _kernels() -> Finding:
    try:
        from pyint8.streaming.extension import _core
    except Pyint8Error as error:
        return Finding("extension", "broken", "not built", {}, "nothing can be loaded", error.problem)
    if _core.has_kernels():
        return Finding("extension", "ok", "built, with kernels for GPUs", {"kernels": True})
    return Finding(
        "extension",
        "slow",
        "built, without kernels for GPUs",
        {"kernels": False},
        "on a GPU, weights are cast and transposed by torch, with Python in between",
        "install a wheel, or build where NVRTC or a CUDA toolkit is found",
    )


def _torch(found: list[Gpu]) -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            "torch at work", "broken", f"cannot be imported: {error}", {}, "nothing can be loaded", _NO_TORCH
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": count}
    value = f"{torch.__version__}, {count} GPUs"
    if found and not count:
        reason = "was built without CUDA" if torch.version.cuda is None else "does not open the GPUs"
        mend = "install a build of torch for this driver's CUDA: https://pytorch.org, and see CUDA_VISIBLE_DEVICES"
        return Finding("torch at work", "slow", f"{value}: it {reason}", facts, "models are loaded onto the CPU", mend)
    return Finding("torch at work", "ok", value, facts)


def _entry_point() -> Finding:
    from pyint8.errors import MissingDependencyError

    try:
        from pyint8.quantizer import ENTRY_POINT, find_entry_point
    except (MissingDependencyError, ImportError, OSError) as error:
        mend = "`pip install -U bitsandbytes`"
        return Finding("quantizer", "broken", f"bitsandbytes fails: {error}", {}, "nothing can be loaded", mend)
    if find_entry_point() is not None:
        return Finding("quantizer", "ok", f"bitsandbytes' {ENTRY_POINT}", {"entry_point": True})
    import torch

    if not torch.cuda.is_available():
        return Finding("quantizer", "ok", "bitsandbytes' Python operator, on the CPU", {"entry_point": False})
    return Finding(
        "quantizer",
        "slow",
        f"bitsandbytes' Python operator: its library has no {ENTRY_POINT}, or another one",
        {"entry_point": False},
        "Python stands between the bus and every weight",
        "install a bitsandbytes of a known version, with its library for this CUDA (`python -m bitsandbytes`)",
    )


def _described(ordinal: int, found: list[Gpu]) -> Gpu | None:
    """The GPU that is torch's `cuda:ordinal`, if nvidia-smi lists it."""
    import torch

    uuid = str(torch.cuda.get_device_properties(ordinal).uuid)
    return next((gpu for gpu in found if gpu.uuid == uuid), None)


def _bus(ordinal: int, gpu: Gpu | None) -> Finding:
    from pyint8.streaming.speed import bus_speed

    name = f"bus of cuda:{ordinal}" if gpu is None else f"bus of GPU {gpu.index}"
    try:
        speed = bus_speed(ordinal)
    except RuntimeError as error:  # no memory left, or the driver fails
        return Finding(name, "unknown", f"cannot be measured: {error}", {}, None, "free some of the GPU's memory")
    expected = 0.0 if gpu is None or gpu.link is None else gpu.link.gigabytes_per_second
    facts: dict[str, Any] = {"gigabytes_per_second": speed, "lanes_give": expected or None}
    value = f"{speed:.1f} GB/s from pinned memory" + (f" of {expected:.0f}" if expected else "")
    if speed < _GOOD_BUS * expected:
        mend = "see that nothing else uses the bus, that the process runs near the GPU (`numactl`), and the link above"
        return Finding(name, "slow", value, facts, "no load is faster than the bus", mend)
    return Finding(name, "ok", value, facts)
