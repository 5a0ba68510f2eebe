"""Whatever is wrong with a checkpoint's files, what is raised is a Pyint8Error: each case is one that was another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pyint8
from pyint8 import errors
from pyint8.checkpoint import open_checkpoint
from pyint8.streaming.natural_order import natural_key

pytestmark = pytest.mark.usefixtures("nothing_left")

Change = Callable[[Path], Any]
INDEX = "model.safetensors.index.json"


def in_json(name: str, **fields: Any) -> Change:
    """Sets fields of a JSON file of the folder; one that is None goes."""

    def change(folder: Path) -> None:
        path = folder / name
        content = {**json.loads(path.read_text() if path.exists() else "{}"), **fields}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def tensor(name: str) -> Change:
    """Adds one to the file."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, name: torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})

    return change


def sharded(metadata: Any) -> Change:
    """Gives the one file an index."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        names = load_file(folder / "model-1.safetensors")
        in_json(INDEX, metadata=metadata, weight_map=dict.fromkeys(names, "model-1.safetensors"))(folder)

    return change


def adapter(*, files: str = "adapter_model.safetensors", **fields: Any) -> Change:
    """Makes it the folder of an adapter, whose base is beside it."""

    def change(folder: Path) -> None:
        base = folder.with_name("base")
        folder.rename(base)
        folder.mkdir()
        (folder / files).mkdir() if files.endswith("/") else (folder / files).write_bytes(b"")
        in_json("adapter_config.json", base_model_name_or_path=str(base), **fields)(folder)

    return change


DEEP = "[" * 100_000 + "]" * 100_000
LORA = {"peft_type": "LORA", "target_modules": ["q_proj"]}
CASES: dict[str, tuple[Change, str]] = {
    "an index without metadata": (sharded(None), "the index has no `metadata`"),
    "an index whose metadata is a list": (sharded([1]), "no JSON object"),
    "a deep config.json": (text("config.json", DEEP), "nested too deeply"),
    "a deep generation_config.json": (text("generation_config.json", DEEP), "nested too deeply"),
    "an adapter's deep configuration": (
        lambda f: (adapter()(f), text("adapter_config.json", DEEP)(f)),
        "no base model",
    ),
    "a tensor of an odd digit": (tensor("model.layers.0²"), "0²"),
    "a tensor of many digits": (tensor(f"layers.{'9' * 5000}"), "digits"),
    "a file with NUL in its name": (in_json("config.json", transformers_weights="a\0b"), "no file can have the name"),
    "a file with half a pair": (in_json("config.json", transformers_weights="a\ud800"), "no file can have the name"),
    "weights that are a folder": (in_json("config.json", transformers_weights="."), "neither a safetensors file"),
    "a class that is a number": (in_json("config.json", architectures=[5]), "TypeError"),
    "no heads": (in_json("config.json", num_attention_heads=0), "ZeroDivisionError"),
    "no such dtype": (in_json("config.json", dtype="nope"), "nope"),
    "a quantization that is text": (in_json("config.json", quantization_config="x"), "to_dict"),
    "an adapter_config.json that is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "adapter_config.json").mkdir()),
        "a folder and no file",
    ),
    "an adapter in a pickle": (
        adapter(files="adapter_model.bin", **LORA),
        "transformers loads no adapter from a pickle",
    ),
    "an adapter that is a folder": (adapter(files="adapter_model.safetensors/", **LORA), "cannot be loaded"),
    "an adapter of no kind": (adapter(peft_type="NOPE"), "NOPE"),
    "an adapter without a kind": (adapter(peft_type=None), "no kind of adapter"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_a_pyint8_error(case: str, copy_of: Callable[..., Path]) -> None:
    change, words = CASES[case]
    folder = copy_of("llama")
    change(folder)
    with pytest.raises(errors.Pyint8Error) as caught:
        pyint8.load(folder, "cpu")
    assert words in str(caught.value)


@pytest.mark.parametrize("where", [{"subfolder": "a\0b"}, {"subfolder": "a\ud800"}, {"variant": "a\0b"}], ids=repr)
def test_arguments_that_name_no_file(where: dict[str, str], copy_of: Callable[..., Path]) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="no file can have the name"):
        pyint8.load(copy_of("llama"), "cpu", **where)


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, ImportError, KeyboardInterrupt])
def test_what_is_no_checkpoints_fault_stays(
    kind: type[BaseException], copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("not here")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", fail)
    with pytest.raises(kind, match="not here"):
        pyint8.load(copy_of("llama"), "cpu")


def test_an_index_of_safetensors_names_nothing_else(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.bin")
    in_json(INDEX, metadata={}, weight_map={"w": "w.bin"})(tmp_path)
    for use_safetensors in (None, True):
        with pytest.raises(errors.CheckpointError, match="the index is of safetensors files") as caught:
            open_checkpoint(tmp_path, use_safetensors=use_safetensors)
        assert caught.value.tensor == "w"


def test_numbers_in_names_have_any_length() -> None:
    names = ["x1²", "x", "l.9", "l.10", "l.2", f"l.{'9' * 5000}", f"l.1{'0' * 5000}", "l.007"]
    ordered = sorted(names, key=natural_key)
    assert [name for name in ordered if len(name) < 9 and name.startswith("l")] == ["l.2", "l.007", "l.9", "l.10"]
    assert ordered.index(f"l.{'9' * 5000}") < ordered.index(f"l.1{'0' * 5000}")


@contextmanager
def no_more_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:

        def refuse(_: object) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr("threading.Thread.start", refuse)
        yield


def test_a_load_gets_by_without_threads_of_pythons(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("llama")
    expected = pyint8.load(folder, "cpu").state_dict()
    with no_more_threads():
        found = pyint8.load(folder, "cpu").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_read_ahead_that_fails_is_left_out(copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("pyint8.streaming.prefetch.cold_steps", fail)
    pyint8.load(copy_of("llama"), "cpu")
