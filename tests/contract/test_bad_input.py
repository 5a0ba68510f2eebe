"""Damaged and hostile checkpoints through pyint8.load: a typed error that says what, where and what to do.

Values that int8 cannot hold and nonsense arguments are in test_bad_values.py, loads that something cuts short in
test_cut_short.py. After every test, no thread, file descriptor or pinned memory is left.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from zoo import PREQUANTIZED

import pyint8
from pyint8 import errors
from pyint8.checkpoint import read_header

pytestmark = pytest.mark.usefixtures("nothing_left")

FILE = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Q_SCALES = "model.layers.0.self_attn.q_proj.SCB"
Q_FORMAT = "model.layers.0.self_attn.q_proj.weight_format"
C_ATTN = "transformer.h.1.attn.c_attn.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
EXPERT_0 = EXPERT.replace("experts.1", "experts.0")
NORM = "model.norm.weight"
Copy = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Tensors], object], file: str = FILE) -> None:
    """Write the file again with other tensors."""
    with safe_open(folder / file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the file again with another header over the same data."""
    raw = (folder / FILE).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@dataclass(frozen=True)
class Case:
    name: str
    damage: Callable[[Path], object]
    kind: type[errors.Pyint8Error]
    says: str
    tensor: str | None = None
    file: str | None = FILE
    model: str = "llama"
    checkpoint: str = "bf16"
    placed: bool = True  # whether the byte is known


def cut(folder: Path) -> None:
    os.truncate(folder / FILE, read_header(folder / FILE).entries[Q_PROJ].offset + 77)


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor], of: str | None = None) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: make(tensors[of or name])}))


def retype(name: str, dtype: str, shape: list[int] | None = None) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        header[name] |= {"dtype": dtype} | ({} if shape is None else {"shape": shape})

    return lambda folder: edit_header(folder, change)


def six_bits(folder: Path) -> None:
    put(Q_PROJ, lambda tensor: tensor.new_zeros(tensor.numel() * 6 // 8, dtype=torch.uint8))(folder)
    retype(Q_PROJ, "F6_E2M3", [64, 64])(folder)


def other_method(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(quantization_config=fields))


def without_config_key(key: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.pop(key))


def with_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(fields))


HEADER, MISSING, TRUNCATED = errors.HeaderError, errors.CheckpointNotFoundError, errors.TruncatedError
STATE, SHAPE, MODEL = errors.QuantizationStateError, errors.ShapeMismatchError, errors.ModelNotSupportedError
SHARD = "model-00002-of-00005.safetensors"

CASES = [
    Case("cut", cut, TRUNCATED, "too early, .* download the file again", Q_PROJ),
    Case("cut in the header", lambda f: os.truncate(f / FILE, 100), TRUNCATED, "download the file again"),
    Case("nothing in it", lambda f: os.truncate(f / FILE, 0), TRUNCATED, "0 bytes.*download the file again"),
    Case("more dtype than bytes", retype(NORM, "F64"), HEADER, "512 bytes, .* span 128; download", NORM),
    Case(
        "a dtype of no format", retype(NORM, "F7"), HEADER, "unknown dtype 'F7'; .*save the tensor", NORM, placed=False
    ),
    Case("a dtype torch lacks", six_bits, errors.CheckpointError, "no dtype for F6_E2M3; convert", Q_PROJ),
    Case("no folder", shutil.rmtree, MISSING, "no such .*check the path", file="", placed=False),
    Case("no checkpoint", lambda f: (f / FILE).unlink(), MISSING, "save_pretrained", file="", placed=False),
    Case(
        "a .bin that is none",
        lambda f: (f / FILE).rename(f / "pytorch_model.bin").write_bytes(b"junk" * 99),
        errors.CheckpointError,
        r"it cannot be read as data alone: it is damaged|torch cannot read it .*; download it again",
        file="pytorch_model.bin",
        placed=False,
    ),
    Case(
        "safetensors named .bin",
        lambda f: (f / FILE).rename(f / "pytorch_model.bin"),
        errors.CheckpointError,
        r"it is a safetensors file; let its name end in \.safetensors",
        file="pytorch_model.bin",
        placed=False,
    ),
    Case(
        "a pointer of Git LFS named .bin",
        lambda f: (f / FILE).rename(f / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n"),
        errors.CheckpointError,
        "run `git lfs pull`",
        file="pytorch_model.bin",
        placed=False,
    ),
    Case("a shape that fits no Linear", put(Q_PROJ, lambda t: t[:48]), SHAPE, r"\[48, 64\].*needs \[64, 64\]", Q_PROJ),
    Case("a shape that fits no norm", put(NORM, lambda t: t[:5]), SHAPE, "ignore_mismatched_sizes=True", NORM),
    Case("transposed Conv1D", put(C_ATTN, lambda t: t.T), SHAPE, r"\[96, 32\].*needs \[32, 96\]", C_ATTN, model="gpt2"),
    Case(
        "an expert unlike the others",
        put(EXPERT, lambda t: t[:7]),
        errors.CheckpointError,
        "shape",
        EXPERT,
        model="mixtral",
    ),
    Case("no SCB", drop(Q_SCALES), STATE, "without its scales.*save the", Q_PROJ, checkpoint=PREQUANTIZED),
    Case("no SCB, no format", drop(Q_SCALES, Q_FORMAT), STATE, "without its scales", Q_PROJ, checkpoint=PREQUANTIZED),
    Case("SCB too short", put(Q_SCALES, lambda t: t[:7]), STATE, r"\[7\].*\[64\]", Q_PROJ, checkpoint=PREQUANTIZED),
    Case("SCB of fp16", put(Q_SCALES, torch.Tensor.half), STATE, "F16.*must be F32", Q_PROJ, checkpoint=PREQUANTIZED),
    Case("another format", put(Q_FORMAT, lambda t: t + 1), STATE, "only .*format 0", Q_PROJ, checkpoint=PREQUANTIZED),
    Case("SCB of floats", put(Q_PROJ, torch.Tensor.half), STATE, "must be int8", Q_PROJ, checkpoint=PREQUANTIZED),
    Case("SCB without weight", drop(Q_PROJ), STATE, f"belongs to {Q_PROJ}", Q_SCALES, checkpoint=PREQUANTIZED),
    Case(
        "int8, and no word of it",
        without_config_key("quantization_config"),
        STATE,
        "SCB",
        "model.layers.0.mlp.down_proj.weight",
        checkpoint=PREQUANTIZED,
    ),
    Case(
        "shard gone",
        lambda f: (f / SHARD).unlink(),
        MISSING,
        "missing; .*download",
        file=SHARD,
        model="llama_sharded",
        placed=False,
    ),
    Case(
        "shard is a folder",
        lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()),
        errors.ReadError,
        "this is a folder and no file; put the file itself there",
        file=SHARD,
        model="llama_sharded",
        placed=False,
    ),
    Case("no config", lambda f: (f / "config.json").unlink(), MODEL, "config.json", file=None),
    Case("config is no JSON", lambda f: (f / "config.json").write_text("{"), MODEL, "config.json", file=None),
    Case("config of a wrong type", with_config(hidden_size="big"), MODEL, "(?s)cannot be read.*hidden_size", file=None),
    Case("a class that is no model", with_config(architectures=["LlamaConfig"]), MODEL, "say which", file=None),
    Case("quantized by nobody knows what", other_method(bits=4), MODEL, "by a method it does not name", file=None),
    Case(
        "an expert that is missing",
        drop(EXPERT),
        errors.CheckpointError,
        r"merged of \d tensors named .*\.w3",
        EXPERT_0,
        model="mixtral",
        placed=False,
    ),
    Case(
        "an expert of another shape",
        put(EXPERT_0, lambda t: t[:7]),
        SHAPE,
        r"its shape is \[7, .* that of the others",
        EXPERT_0,
        model="mixtral",
    ),
    Case(
        "int8 of an expert that is to be fused",
        put(EXPERT_0, lambda t: t.to(torch.int8)),
        STATE,
        "int8 codes cannot be split or fused .*; quantize the 16-bit checkpoint",
        EXPERT_0,
        model="mixtral",
        checkpoint=PREQUANTIZED,
    ),
    Case("unknown model_type", with_config(model_type="ghost"), MODEL, "`ghost`.*Install a release", file=None),
    Case("unknown class", with_config(architectures=["Ghost"]), MODEL, "class Ghost.*say which to load", file=None),
    Case("no class", without_config_key("architectures"), MODEL, "names no class.*say which to load", file=None),
    Case("gptq", other_method(quant_method="gptq", bits=4), MODEL, "by gptq: .*unquantized checkpoint", file=None),
    Case("fp8", other_method(quant_method="fp8"), MODEL, "by fp8: .*unquantized checkpoint", file=None),
    Case("bnb 4 bit", other_method(quant_method="bitsandbytes", load_in_4bit=True), MODEL, "4-bit", file=None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage(case: Case, copy_of: Copy) -> None:
    folder = copy_of(case.model, case.checkpoint)
    case.damage(folder)
    with pytest.raises(case.kind, match=rf"(?s){case.says}") as caught:
        pyint8.load(folder, "cpu")
    error: Any = caught.value
    if case.file is None:
        assert str(folder) in str(error)
    else:
        assert error.path == str(folder / case.file)
        assert error.tensor == case.tensor
        assert (error.offset is not None) == case.placed
        assert all(text in str(error) for text in [error.path, case.tensor or "", str(error.offset or "")])


def test_a_directory_in_place_of_the_file_is_no_checkpoint(copy_of: Copy) -> None:
    folder = copy_of("llama")
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    with pytest.raises(errors.CheckpointNotFoundError, match=r"model\.safetensors is no file") as caught:
        pyint8.load(folder, "cpu")
    assert caught.value.path == str(folder)


def test_refused_by_the_operating_system(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the refusal is made where Python opens files."""
    folder = copy_of("llama")

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("pyint8.checkpoint.safetensors.open_file", refuse)
    with pytest.raises(errors.ReadError, match="give this user permission to read it") as caught:
        pyint8.load(folder, "cpu")
    assert (caught.value.path, caught.value.errno) == (str(folder / FILE), errno.EACCES)


@pytest.mark.parametrize("verb", [lambda folder: pyint8.load(folder, "cpu"), pyint8.inspect])
def test_a_configuration_that_the_disk_refuses(
    copy_of: Copy, monkeypatch: pytest.MonkeyPatch, verb: Callable[[Path], Any]
) -> None:
    config = copy_of("llama") / "config.json"
    genuine = open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path) == str(config):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return genuine(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(errors.ReadError, match="check the disk") as caught:
        verb(config.parent)
    assert (caught.value.path, caught.value.errno) == (str(config), errno.EIO)


@pytest.mark.parametrize("suffix", ["bf16", PREQUANTIZED])
def test_a_configuration_that_is_there_only_once(suffix: str, copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stat of it that fails means to transformers that it is not there: it takes its class's defaults, silently."""
    folder = copy_of("llama", suffix)
    genuine, reads = LlamaConfig.from_dict, 0

    def without_names(fields: dict[str, Any], **more: Any) -> Any:
        nonlocal reads
        reads += 1
        return genuine({**fields, "architectures": None} if reads > 1 else fields, **more)

    monkeypatch.setattr(LlamaConfig, "from_dict", without_names)
    with pytest.raises(errors.ReadError, match="took it for absent when it read it again; check the disk") as caught:
        pyint8.load(folder, "cpu")
    assert caught.value.path == str(folder / "config.json")
