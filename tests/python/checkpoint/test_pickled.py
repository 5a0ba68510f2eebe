"""Checkpoints that torch.save wrote: found by offset, never trusted, and loaded as transformers loads them."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from oracle import SERIALIZABLE, compare_loading_info, compare_models, compare_outputs, peer_load, show
from safetensors.torch import load_file
from torch import nn
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import StreamOptions
from pyint8.checkpoint import Entry, EntryInMemory, open_checkpoint, read_pickled
from pyint8.errors import CheckpointError, CheckpointNotFoundError, Pyint8Error, TruncatedError
from pyint8.report import Recorder
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest

CPU = torch.device("cpu")
TINY = StreamOptions(threads=2, slot_bytes=8192, host_scratch=1 << 20)


def streamed(entries: dict[str, Entry], *, in_bands: bool = False) -> dict[str, torch.Tensor]:
    with open_stream([TensorRequest(entry, CPU, in_bands) for entry in entries.values()], TINY) as stream:
        if not in_bands:
            return {name: stream.whole(name) for name in entries}
        return {name: torch.cat([band.clone() for _, band in stream.bands(name)]) for name in entries}


def many_kinds() -> dict[str, torch.Tensor]:
    base = torch.arange(24 * 40, dtype=torch.float32).reshape(24, 40)
    return {
        "whole": base,
        "rows": base[3:7],
        "turned": base.T,
        "every_other": base[::2, 1::3],
        "column": base[:, 5],
        "expanded": torch.randn(1, 7).expand(5, 7),
        "bf16": torch.randn(300, 600).bfloat16(),
        "turned_fp16": torch.randn(300, 700).half().T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False, True]),
        "codes": torch.randint(-127, 128, (5, 6), dtype=torch.int8),
        "parameter": nn.Parameter(torch.randn(4)),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("in_bands", [False, True])
def test_every_kind_of_tensor_is_streamed(tmp_path: Path, legacy: bool, in_bands: bool) -> None:
    tensors = many_kinds()
    path = tmp_path / "tensors.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    entries = read_pickled(path).entries
    assert entries.keys() == tensors.keys()
    if in_bands:
        entries = {name: entry for name, entry in entries.items() if entry.torch_shape}
    for name, tensor in streamed(entries, in_bands=in_bands).items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, tensors[name]), name


def test_nothing_but_the_directory_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"x": torch.randn(1000, 1000), "y": torch.randn(3)}, path)
    entries = read_pickled(path).entries
    assert not any(isinstance(entry, EntryInMemory) for entry in entries.values())
    assert [(entry.name, entry.dtype, entry.shape, entry.nbytes) for entry in entries.values()] == [
        ("x", "F32", (1000, 1000), 4_000_000),
        ("y", "F32", (3,), 12),
    ]
    with path.open("rb") as file:
        file.seek(entries["y"].offset)
        assert torch.frombuffer(bytearray(file.read(12)), dtype=torch.float32).equal(torch.load(path)["y"])


def test_the_extension_reads_by_offset(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(100, 10), "y": torch.randn(3)}, tmp_path / "x.pth")
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    recorder = Recorder()
    wanted = [TensorRequest(entry, CPU) for entry in checkpoint.values()]
    with open_stream(wanted, TINY, recorder=recorder) as stream:
        for name in checkpoint:
            stream.whole(name)
    assert recorder.report.engine["bytes_delivered"] == checkpoint.nbytes == 4012


# --- models -----------------------------------------------------------------------------------------------------------


def as_bin(folder: Path, *, shards: int = 1, legacy: bool = False) -> None:
    """Rewrites a folder's safetensors as transformers 4 would have saved them."""
    tensors = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return
    weight_map = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = dict(list(tensors.items())[shard::shards])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("form", [{}, {"shards": 3}, {"legacy": True}], ids=["single", "sharded", "legacy"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral"])
def test_models_are_the_peers(name: str, form: dict[str, Any], copy_of: Callable[..., Path]) -> None:
    folder = copy_of(name, "bf16")
    as_bin(folder, **form)
    model = ZOO[name]
    theirs, info = peer_load(folder, model.cls, device_map={"": "cpu"}, dtype=torch.float16)
    ours, report = pyint8.load(folder, "cpu", model=model.cls, dtype=torch.float16, return_report=True)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE]) + compare_loading_info(report.loading_info, info)
    found += compare_outputs(ours, theirs, model.inputs(theirs))
    assert not found, show(found)
    if "legacy" not in form:
        assert report.engine["bytes_delivered"] == report.checkpoint_bytes == open_checkpoint(folder).nbytes


def test_int8_as_bin(copy_of: Callable[..., Path], checkpoints: CheckpointStore) -> None:
    from zoo import PREQUANTIZED

    folder = copy_of("llama", PREQUANTIZED)
    expected = pyint8.load(folder, "cpu")
    as_bin(folder)
    found = compare_models(pyint8.load(folder, "cpu"), expected)
    assert not found, show(found)


def test_offload_to_the_disk(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of("llama", "bf16")
    as_bin(folder)
    modules = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    kwargs: dict[str, Any] = {"dtype": torch.float16}
    kwargs["device_map"] = {name: "disk" if name == "model.layers.1" else "cpu" for name in modules}
    int8 = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    theirs = tf.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=int8, offload_folder=tmp_path / "theirs", **kwargs
    )
    config = pyint8.Int8Config(fp32_cpu_offload=True)
    ours = pyint8.load(folder, config=config, offload_folder=tmp_path / "ours", **kwargs)
    assert not compare_outputs(ours, theirs, ZOO["llama"].inputs(theirs))


def test_safetensors_come_first_unless_told_otherwise(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("llama", "bf16")
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    norm = "model.norm.weight"
    assert pyint8.load(folder, "cpu").get_parameter(norm).any()
    assert pyint8.load(folder, "cpu", use_safetensors=True).get_parameter(norm).any()
    assert not pyint8.load(folder, "cpu", use_safetensors=False).get_parameter(norm).any()
    os.unlink(folder / "model.safetensors")
    assert not pyint8.load(folder, "cpu").get_parameter(norm).any()
    with pytest.raises(CheckpointNotFoundError, match=r"none of model.safetensors, model.safetensors.index.json, but"):
        pyint8.load(folder, "cpu", use_safetensors=True)


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    torch.save(source.state_dict(), tmp_path / "model.pt")
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    pyint8.load(tmp_path / "model.pt", "cpu", model=module, dtype=torch.float32)
    assert torch.equal(module[1].weight, source[1].weight)
    inputs = torch.randn(4, 64)
    assert torch.allclose(module(inputs), source(inputs), atol=0.05)


# --- what cannot be trusted -------------------------------------------------------------------------------------------


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_not_run(tmp_path: Path, legacy: bool) -> None:
    path, made = tmp_path / "pytorch_model.bin", tmp_path / "made"
    torch.save({"x": torch.zeros(3), "y": Code(made)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"wants to run code.*weights_only=False") as caught:
        open_checkpoint(path)
    assert caught.value.path == str(path)
    assert not made.exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and in files all the same
@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: {"state_dict": {"x": torch.zeros(3)}}, r"its tensors are inside 'state_dict'"),
        (lambda: [torch.zeros(3)], "it holds a list, not tensors by name"),
        (lambda: {1: torch.zeros(3)}, "a tensor is named 1; names are strings"),
        (lambda: {"x": torch.zeros(3, 3).to_sparse()}, "torch.sparse_coo; save it as an ordinary one"),
        (lambda: {"x": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)}, "torch cannot read it"),
        (lambda: {"x": torch.zeros(3).byte().view(torch.bits8)}, "a tensor of dtype bits8 cannot be loaded"),
    ],
    ids=["nested", "list", "number", "sparse", "quantized", "bits"],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, state: Callable[[], Any], words: str) -> None:
    path = tmp_path / "x.pt"
    torch.save(state(), path)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value",
    [torch._neg_view(torch.ones(3)), torch.ones(3, dtype=torch.complex64).conj()],
    ids=["negative", "conjugate"],
)
def test_what_is_stored_otherwise_than_it_reads_is_refused(tmp_path: Path, value: torch.Tensor, legacy: bool) -> None:
    torch.save({"x": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"save it resolved: tensor\.resolve_neg\(\)") as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert caught.value.tensor == "x"


def test_what_is_no_tensor_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"x": torch.zeros(3), "step": 7}, tmp_path / "x.pt")
    with caplog.at_level(logging.WARNING, "pyint8"):
        assert list(open_checkpoint(tmp_path / "x.pt")) == ["x"]
    assert "step are no tensors" in caplog.text


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "x.bin"
    torch.save({"x": torch.randn(1000)}, path)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(Pyint8Error) as caught:
        open_checkpoint(path)
    assert isinstance(caught.value, (CheckpointError, TruncatedError))
    assert caught.value.path == str(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_opened_often_leaves_nothing(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save(
        {f"layer.{at}.weight": torch.zeros(4, 4) for at in range(20)}, path, _use_new_zipfile_serialization=zipped
    )

    def blocks_after(times: int) -> int:
        for _ in range(times):
            read_pickled(path)
        gc.collect()
        return sys.getallocatedblocks()

    blocks_after(20)
    before = blocks_after(20)
    assert blocks_after(300) - before < 300  # less than one an open
