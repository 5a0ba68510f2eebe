"""Every way to load that is compared: a function from a folder to what it loaded.

Names ending in "-int8" and `pyint8` give a quantized model; the others say what they give. A contender imports what it
needs itself, so that one that is not installed fails alone, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyint8.host.speed import read_by_threads

DTYPE = torch.float16
ON_GPU = torch.cuda.is_available()
DEVICE: Any = 0 if ON_GPU else "cpu"
DEVICE_MAP: Any = "balanced" if torch.cuda.device_count() > 1 else {"": DEVICE}


@dataclass(frozen=True)
class Contender:
    """One way to load.

    Attributes:
        gives: "int8 model", "16-bit model", "tensors", "uninitialized model" or "nothing".
        load: Returns what was loaded, and details for the record.
        needs_gpu: Whether it is left out on a machine without one.
        imports: What the time of `load` should not count; run before the clock starts.
    """

    gives: str
    load: Callable[[Path], tuple[Any, dict[str, Any]]]
    needs_gpu: bool = False
    imports: Callable[[Path], None] = lambda folder: None


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _import_model_code(folder: Path) -> None:
    """transformers imports a model's code when its class is named."""
    import bitsandbytes  # noqa: F401
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    getattr(transformers, config.architectures[0])


def _import_pyint8(folder: Path) -> None:
    import pyint8.models.transformers.loading  # noqa: F401

    _import_model_code(folder)


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def _pyint8(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    import pyint8

    model, report = pyint8.load(
        folder,
        device_map=DEVICE_MAP,
        dtype=DTYPE,
        return_report=True,
        progress=False,
        options=pyint8.StreamOptions(**options),
    )
    return model, {"phases": report.seconds, "engine": report.engine}


def _raw_engine(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Every tensor of the checkpoint through the engine into a scratch buffer on the device; no model.

    Of several GPUs each gets an equal part of the bytes, and a thread that waits for them.
    """
    import time
    from concurrent.futures import ThreadPoolExecutor

    from pyint8.checkpoint import open_checkpoint
    from pyint8.config import StreamOptions
    from pyint8.streaming.requests import TensorRequest
    from pyint8.streaming.stream import TensorStream
    from pyint8.streaming.transport import Transport

    checkpoint = open_checkpoint(str(folder))
    devices = [torch.device("cuda", gpu) for gpu in range(torch.cuda.device_count())] or [torch.device("cpu")]
    order = sorted(checkpoint.values(), key=lambda entry: (entry.path, entry.offset))
    share = sum(entry.nbytes for entry in order) / len(devices)
    parts: list[list[TensorRequest]] = [[] for _ in devices]
    nbytes = 0
    for entry in order:
        part = min(int(nbytes / share), len(devices) - 1)
        parts[part].append(TensorRequest(entry, devices[part], in_bands=True))
        nbytes += entry.nbytes

    def drain(stream: TensorStream, part: list[TensorRequest]) -> None:
        for request in part:
            for _ in stream.bands(request.entry.name):
                pass

    start = time.perf_counter()
    transport = Transport(StreamOptions(), gpus=len(devices))
    streams = [TensorStream(part, transport) for part in parts]
    set_up = time.perf_counter() - start
    try:
        with ThreadPoolExecutor(len(parts)) as threads:
            list(threads.map(drain, streams, parts))
        for device in devices if ON_GPU else ():
            torch.cuda.synchronize(device)
        streamed = time.perf_counter() - start - set_up
        engine = transport.stats()
    finally:
        transport.close()
        for stream in streams:
            stream.close()
    return None, {"set_up_seconds": set_up, "stream_seconds": streamed, "engine": engine}


def _read(folder: Path, *, direct: bool) -> tuple[Any, dict[str, Any]]:
    """What the disk, or the page cache, gives a plain reader that keeps nothing."""
    read_by_threads(shards(folder), len(os.sched_getaffinity(0)), direct=direct)
    return None, {}


def _transformers_int8(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    quantization = {}
    if not _is_quantized(folder):
        quantization["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=DEVICE_MAP, dtype=DTYPE, **quantization
    )
    return model, {}


def _transformers_16bit(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE_MAP, dtype=DTYPE), {}


def _accelerate_int8(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    config = transformers.AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.tie_weights()
    quantization = BnbQuantizationConfig(load_in_8bit=True, torch_dtype=DTYPE)
    model = load_and_quantize_model(
        model, weights_location=str(folder), bnb_quantization_config=quantization, device_map=DEVICE_MAP
    )
    return model, {}


def _free_lifecycle(folder: Path) -> tuple[Any, dict[str, Any]]:
    from benchmarks import free_lifecycle

    if _is_quantized(folder):
        raise ValueError("there is nothing to quantize in this checkpoint")
    return free_lifecycle.load(folder, DEVICE, DTYPE), {}


def _safetensors(folder: Path) -> tuple[Any, dict[str, Any]]:
    from safetensors.torch import load_file

    return [load_file(path, device="cuda:0" if ON_GPU else "cpu") for path in shards(folder)], {}


def _prefetched(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    import safetensors

    if not hasattr(safetensors.safe_open, "prefetch"):
        raise ImportError(f"safetensors {safetensors.__version__} has no prefetch; 0.9 has")
    for path in shards(folder):
        with safetensors.safe_open(str(path), framework="pt") as file, file.prefetch(device="cuda:0") as loader:
            yield from loader


def _safetensors_prefetch(folder: Path) -> tuple[Any, dict[str, Any]]:
    return dict(_prefetched(folder)), {}


def _safetensors_prefetch_int8(folder: Path) -> tuple[Any, dict[str, Any]]:
    """bitsandbytes' operator on every linear weight as it comes; no model is built."""
    from bitsandbytes.functional import int8_vectorwise_quant

    kept: dict[str, Any] = {}
    for name, tensor in _prefetched(folder):
        linear = tensor.ndim == 2 and "embed" not in name and "lm_head" not in name
        kept[name] = int8_vectorwise_quant(tensor.to(DTYPE))[:2] if linear else tensor.to(DTYPE)
    return kept, {}


def _fastsafetensors(folder: Path) -> tuple[Any, dict[str, Any]]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cuda:0" if ON_GPU else "cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in shards(folder)]})
    buffers = loader.copy_files_to_device()
    return [loader, buffers, [buffers.get_tensor(name) for name in buffers.key_to_rank_lidx]], {}


def _instanttensor(folder: Path) -> tuple[Any, dict[str, Any]]:
    from instanttensor import safe_open

    with safe_open([str(path) for path in shards(folder)], framework="pt", device=0) as file:
        return dict(file.tensors()), {}


def _runai(folder: Path) -> tuple[Any, dict[str, Any]]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in shards(folder)])
        return {name: tensor.to("cuda:0" if ON_GPU else "cpu") for name, tensor in streamer.get_tensors()}, {}


CONTENDERS: dict[str, Contender] = {
    "pyint8": Contender("int8 model", _pyint8, imports=_import_pyint8),
    "pyint8-direct": Contender("int8 model", partial(_pyint8, direct_io=True), imports=_import_pyint8),
    "raw-engine": Contender("tensors", _raw_engine, imports=_import_pyint8),
    "read-buffered": Contender("nothing", partial(_read, direct=False)),
    "read-direct": Contender("nothing", partial(_read, direct=True)),
    "transformers-int8": Contender("int8 model", _transformers_int8, imports=_import_model_code),
    "accelerate-int8": Contender("int8 model", _accelerate_int8, needs_gpu=True, imports=_import_model_code),
    "transformers-16bit": Contender("16-bit model", _transformers_16bit, imports=_import_model_code),
    "free-lifecycle": Contender("uninitialized model", _free_lifecycle, imports=_import_model_code),
    "safetensors": Contender("tensors", _safetensors),
    "safetensors-prefetch": Contender("tensors", _safetensors_prefetch, needs_gpu=True),
    "safetensors-prefetch-int8": Contender("int8 tensors", _safetensors_prefetch_int8, True, _import_model_code),
    "fastsafetensors": Contender("tensors", _fastsafetensors),
    "instanttensor": Contender("tensors", _instanttensor, needs_gpu=True),
    "runai-model-streamer": Contender("tensors", _runai),
}
