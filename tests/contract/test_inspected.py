"""`pyint8.inspect` says beforehand what `pyint8.convert` then writes and `pyint8.load` takes, and reads no tensor."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel, checkpoint_store

import pyint8
from pyint8.streaming import reading
from pyint8.streaming.transport import Transport

CPU = {"": "cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    return checkpoint_store(tmp_path_factory.mktemp("checkpoints"))


def inspected(source: Path, **options: Any) -> pyint8.Inspection:
    """Of a checkpoint of which not one tensor may be read."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor is read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_tensor", refuse)
        patch.setattr(Transport, "__init__", refuse)
        return pyint8.inspect(source, **options)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def kinds(folder: Path) -> dict[str, int]:
    """The bytes of an int8 checkpoint's tensors, by what they are."""
    nbytes: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                tensor = file.get_tensor(name)
                kind = {"SCB": "scales", "weight_format": "formats"}.get(name.rpartition(".")[2], "unquantized")
                nbytes["int8" if tensor.dtype == torch.int8 else kind] += tensor.nbytes
    return dict(nbytes)


def check(source: Path, target: Path, **options: Any) -> pyint8.Inspection:
    found = inspected(source, **options)
    report = pyint8.convert(source, target, device="cpu", **options)
    assert found.int8_files == files(target)
    assert found.int8_kinds == kinds(target)
    assert (found.skipped, found.skipped_bytes) == (report.skipped, report.skipped_bytes)
    assert len(found.int8) == report.tensors["int8"] + report.tensors["pre-quantized"]
    return found


def nbytes_of(model: torch.nn.Module) -> int:
    scales = [parameter.SCB for parameter in model.parameters() if hasattr(parameter, "SCB")]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *scales])


@pytest.mark.parametrize("kind", ["bf16", "fp32", PREQUANTIZED])
@pytest.mark.parametrize("zoo_model", ZOO.values(), ids=list(ZOO))
def test_every_architecture(zoo_model: ZooModel, kind: str, store: CheckpointStore, tmp_path: Path) -> None:
    source = store.folder(zoo_model, kind)
    found = check(source, tmp_path / "int8")
    model = pyint8.load(source, CPU)
    assert found.model == type(model).__name__
    assert found.fits
    assert found.device_bytes == {"cpu": nbytes_of(model)}


@pytest.mark.parametrize("dtype", [torch.float16, "float32", None])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
def test_dtypes(name: str, dtype: Any, store: CheckpointStore, tmp_path: Path) -> None:
    source = store.folder(ZOO[name], "bf16")
    found = check(source, tmp_path / "int8", dtype=dtype)
    assert found.device_bytes == {"cpu": nbytes_of(pyint8.load(source, CPU, dtype=dtype))}


def test_what_is_skipped(store: CheckpointStore, tmp_path: Path) -> None:
    config = pyint8.Int8Config(skip_modules=["k_proj", "lm_head"])
    found = check(store.folder(ZOO["llama"], "bf16"), tmp_path / "int8", config=config)
    assert found.skipped["model.layers.0.self_attn.k_proj"] == "in the list of modules to skip"
    assert not any(name.endswith("k_proj") for name in found.int8)


@pytest.mark.parametrize("alike", [True, False])
def test_a_tied_head_that_the_checkpoint_has_too(store: CheckpointStore, tmp_path: Path, alike: bool) -> None:
    """Whether the two are one only their values show; that it is taken for granted is said."""
    source = shutil.copytree(store.folder(ZOO["llama_tied"], "bf16"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if alike else 1)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = inspected(source)
    assert found.ties_assumed == {"lm_head.weight": "model.embed_tokens.weight"}
    pyint8.convert(source, tmp_path / "int8", device="cpu")
    assert (found.int8_files == files(tmp_path / "int8")) == alike


def test_a_machine_that_is_not_this_one(store: CheckpointStore) -> None:
    source = store.folder(ZOO["llama"], "bf16")
    found = inspected(source, max_memory={0: "60KB", 1: 80_000, "cpu": "1GB"})
    assert found.fits
    assert found.device_memory == {"0": 60_000, "1": 80_000, "cpu": 10**9}
    assert set(found.device_map.values()) > {"0", "1"}
    assert sum(found.device_bytes.values()) == nbytes_of(pyint8.load(source, CPU))


def test_what_does_not_fit(store: CheckpointStore) -> None:
    source, memory = store.folder(ZOO["llama"], "bf16"), {0: "60KB", "cpu": "1GB"}
    found = inspected(source, max_memory=memory)
    assert found.fits is False
    assert found.problem is not None
    assert "modules that are to be quantized on the CPU" in found.problem
    offloads = inspected(source, max_memory=memory, config=pyint8.Int8Config(fp32_cpu_offload=True))
    assert offloads.fits
    assert (offloads.int8, offloads.device_map) == (found.int8, found.device_map)


def test_headroom_leaves_no_memory_unused(store: CheckpointStore) -> None:
    source = store.folder(ZOO["llama"], "bf16")
    scratch = pyint8.StreamOptions().device_bytes
    memory = {0: nbytes_of(pyint8.load(source, CPU)) + 10_000, "cpu": 10**9}
    assert not inspected(source, max_memory={**memory, 0: memory[0] - 10_000}).fits
    # Without such a GPU nothing is subtracted of what `max_memory` says.
    found = inspected(source, max_memory=memory, headroom=scratch)
    assert found.fits
    assert set(found.device_map.values()) == {"0"}


def test_a_model_of_which_nothing_becomes_int8(store: CheckpointStore) -> None:
    config = pyint8.Int8Config(skip_modules=["model", "lm_head"])
    found = inspected(store.folder(ZOO["llama"], "bf16"), config=config)
    assert (found.int8, found.int8_nbytes, found.int8_files) == ((), None, {})
    assert found.fits


def test_it_is_json(store: CheckpointStore) -> None:
    found = inspected(store.folder(ZOO["gpt2"], "bf16"))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["int8_nbytes"] == sum(found.int8_kinds.values())
    assert values["fits"] is True
    assert values["tensors"][0]["name"] == found.tensors[0].name
