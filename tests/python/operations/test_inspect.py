"""What `pyint8.inspect` says of headers, and what it refuses. What it says of models is in tests/contract."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import CheckpointError, CheckpointNotFoundError, OptionError
from pyint8.operations.inspect import inspect_headers


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    tensors = {"b": torch.zeros(3, 4, dtype=torch.bfloat16), "a": torch.ones(5), "c": torch.zeros((), dtype=torch.int8)}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("of_folder", [True, False])
def test_a_plain_checkpoint_gives_the_facts_of_its_headers(plain: Path, of_folder: bool) -> None:
    file = plain / "model.safetensors"
    found = pyint8.inspect(plain if of_folder else file)
    assert found.note is not None
    assert "no config.json" in found.note
    assert (found.model, found.fits, found.int8_nbytes, found.device_map) == (None, None, None, {})
    assert found.dtypes == {"F32": 20, "BF16": 24, "I8": 1}
    assert found.nbytes == 45
    assert found.files == (str(file),)
    content = file.read_bytes()
    for tensor in found.tensors:
        value = load_file(file)[tensor.name]
        assert tensor.shape == tuple(value.shape)
        assert tensor.nbytes == value.nbytes
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == raw


def test_headers_alone_may_be_asked_for(checkpoints: CheckpointStore) -> None:
    source = checkpoints.folder(ZOO["llama_sharded"], "bf16")
    headers, whole = inspect_headers(source), pyint8.inspect(source)
    assert (headers.model, headers.note) == (None, "headers alone were asked for")
    assert len(headers.files) > 1
    assert (headers.tensors, headers.dtypes, headers.nbytes) == (whole.tensors, whole.dtypes, whole.nbytes)


def test_pickled_checkpoints(plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    torch.save(tensors, plain / "pytorch_model.bin")
    found = pyint8.inspect(plain)
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {"a": (5,), "b": (3, 4), "c": ()}


def test_headers_import_nothing_heavy(plain: Path) -> None:
    program = (
        "import sys; from pyint8.operations.inspect import inspect_headers; inspect_headers(sys.argv[1]);"
        "print({'torch', 'transformers', 'bitsandbytes', 'numpy', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, plain], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_is_refused(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = checkpoints.folder(ZOO["llama"], "bf16")
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"device_map": "cpu"}, OptionError, "device_map is 'cpu'"),
        ({"max_memory": 3}, OptionError, "max_memory is 3"),
        ({"max_memory": {0: "many"}}, OptionError, "max_memory of 0"),
        ({"headroom": "a lot"}, OptionError, "headroom is"),
        ({"dtype": "int8"}, OptionError, "dtype is"),
        ({"config": pyint8.Int8Config(has_fp16_weight=True)}, OptionError, "nothing would become int8"),
        ({"load_in_8bit": True}, OptionError, "load_in_8bit is not an argument"),
        ({"path": tmp_path / "absent"}, CheckpointNotFoundError, "no such folder"),
        ({"path": tmp_path}, CheckpointNotFoundError, "the folder holds none of"),
        ({"path": "nobody/nothing-of-the-kind"}, CheckpointNotFoundError, "hf download nobody/nothing-of-the-kind"),
        ({"path": 3}, OptionError, "path is 3"),
    ]
    for arguments, kind, found in refused:
        with pytest.raises(kind, match=found):
            pyint8.inspect(**{"path": source, **arguments})


def test_an_adapter_names_the_model_to_inspect(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    base = checkpoints.folder(ZOO["llama"], "bf16")
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(OptionError, match=f"is an adapter; inspect the model that it is for, {base}"):
        pyint8.inspect(tmp_path / "adapter")


def test_a_truncated_file_is_named(copy_of: Callable[..., Path]) -> None:
    file = copy_of("llama") / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 5)
    with pytest.raises(CheckpointError) as raised:
        pyint8.inspect(file.parent)
    assert raised.value.path == str(file)
