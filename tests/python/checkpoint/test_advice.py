"""Advice about folders and files that are no checkpoint leads to one: what can be followed is followed here."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import CheckpointError, CheckpointNotFoundError, HeaderError, OptionError
from pyint8.streaming.reading import read_tensor

Copy = Callable[..., Path]
TENSORS = {"a": torch.arange(4.0), "b": torch.arange(6.0)}


def advice(path: Path, kind: type[CheckpointError] = CheckpointNotFoundError, **where: Any) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(path, **where)
    assert caught.value.path == str(path)
    return str(caught.value)


def same(path: Path, **where: Any) -> bool:
    checkpoint = open_checkpoint(path, **where)
    return checkpoint.keys() == TENSORS.keys() and all(
        torch.equal(read_tensor(e), TENSORS[n]) for n, e in checkpoint.items()
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, stem: str, extension: str) -> None:
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        path = folder / f"{stem}-{number:05}-of-00002.{extension}"
        if extension == "bin":
            torch.save({name: tensor}, path)
        else:
            save_file({name: tensor}, path)


@pytest.mark.parametrize(
    ("stem", "extension", "where", "index"),
    [
        ("model", "safetensors", {}, "model.safetensors.index.json"),
        ("pytorch_model", "bin", {}, "pytorch_model.bin.index.json"),
        ("model.fp16", "safetensors", {"variant": "fp16"}, "model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model", "safetensors", {}, "model.safetensors.index.json"),
    ],
)
def test_shards_without_their_index(
    tmp_path: Path, stem: str, extension: str, where: dict[str, str], index: str
) -> None:
    write_shards(tmp_path, stem, extension)
    text = advice(tmp_path, **where)
    assert f"which are shards without their index. Download {index}, or, with all shards there, make it" in text
    command = re.sub("^python", sys.executable, text[text.index("python -c") :])
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / index).exists()
    assert same(tmp_path, **where)


def test_shards_that_are_missing_too_are_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model-00002-of-00003.safetensors")
    assert "index.json (shards 1, 3 of 3 are missing too), or" in advice(tmp_path)


def test_a_model_whose_index_was_made_again(copy_of: Copy) -> None:
    folder = copy_of("llama_sharded", "bf16")
    expected = pyint8.load(folder, "cpu")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match="shards without their index") as caught:
        pyint8.load(folder, "cpu")
    command = str(caught.value)[str(caught.value).index("python -c") :]
    subprocess.run(re.sub("^python", sys.executable, command), shell=True, check=True, cwd=folder)
    for name, value in pyint8.load(folder, "cpu").state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("consolidated.safetensors", "Mistral"),
        ("consolidated-00001-of-00002.safetensors", "Mistral"),
        ("consolidated.00.pth", "Meta"),
    ],
)
def test_the_layout_of_somebody_s_own_code(tmp_path: Path, name: str, maker: str) -> None:
    (tmp_path / name).touch()
    text = advice(tmp_path)
    assert f"but {name}: the layout of {maker}'s own code" in text
    assert "Download the same model's files for transformers" in text
    model = {"Mistral": "mistral", "Meta": "llama"}[maker]
    assert f"convert_{model}_weights_to_hf.py of transformers' source" in text
    assert "path" not in text.partition("own code")[2]  # of a file would be refused


def test_a_layout_of_its_own_with_the_usual_names(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    text = advice(folder)
    usual = re.search(r"rename it to (\S+)$", text)
    assert usual is not None
    (folder / "consolidated.safetensors").rename(folder / usual[1])
    assert pyint8.load(folder, "cpu") is not None


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin"])
def test_another_variant(tmp_path: Path, name: str) -> None:
    write_as(tmp_path / name)
    assert advice(tmp_path).endswith(f', but {name}; pass variant="fp16" to load that')
    assert same(tmp_path, variant="fp16")
    assert 'pass variant="fp16"' in advice(tmp_path, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(("use_safetensors", "extension"), [(True, "bin"), (False, "safetensors")])
def test_what_use_safetensors_leaves_out(
    tmp_path: Path, use_safetensors: bool, extension: str, variant: str | None
) -> None:
    name = f"{'pytorch_' if extension == 'bin' else ''}model.{f'{variant}.' if variant else ''}{extension}"
    write_as(tmp_path / name)
    text = advice(tmp_path, use_safetensors=use_safetensors, variant=variant)
    assert text.endswith(f", but {name}; call without use_safetensors to load that")
    assert same(tmp_path, variant=variant)


def test_shards_that_use_safetensors_leaves_out(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", "safetensors")
    assert "call without use_safetensors" in advice(tmp_path, use_safetensors=False)
    assert "without their index" in advice(tmp_path)


def test_a_variant_that_is_not_there(tmp_path: Path) -> None:
    write_as(tmp_path / "model.safetensors")
    assert "but model.safetensors; call without variant to load that" in advice(tmp_path, variant="fp16")
    assert same(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model_v2.bin"])
def test_a_file_of_another_name(tmp_path: Path, name: str) -> None:
    write_as(tmp_path / name)
    text = advice(tmp_path)
    assert "for a module of your own, give its path: pyint8.load(path, model=module)" in text
    assert same(tmp_path / name)
    usual = re.search(r"rename it to ([\w.]+);", text)
    assert usual is not None
    (tmp_path / name).rename(tmp_path / usual[1])
    assert same(tmp_path)


def test_an_adapter_beside_a_configuration(tmp_path: Path) -> None:
    write_as(tmp_path / "adapter_model.safetensors")
    assert "of a PEFT adapter: load the model that it was made for" in advice(tmp_path)


# --- .ckpt ------------------------------------------------------------------------------------------------------------


def write_as(path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["last.ckpt", "model.ckpt", "checkpoint.pth.tar", "weights"])
def test_a_file_of_torch_by_any_name(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert same(tmp_path / name)


def test_safetensors_by_the_name_ckpt(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.ckpt")
    assert same(tmp_path / "x.ckpt")


def trained(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What PyTorch Lightning saves of a training."""
    return {
        "epoch": 3,
        "scale": torch.ones(()),
        "pytorch-lightning_version": "2.4.0",
        "loops": {"fit_loop": {"state_dict": {}}},
        "hyper_parameters": {"lr": 1e-3},
        "state_dict": OrderedDict(state_dict),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
    }


@pytest.mark.parametrize("name", ["last.ckpt", "last.pt"])
def test_a_training_checkpoint(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    torch.save(trained(TENSORS), path)
    before = path.read_bytes()
    text = advice(path, CheckpointError)
    assert "its tensors are inside 'state_dict'" in text
    monkeypatch.chdir(tmp_path)
    exec(text[text.index("torch.save(") :], {"torch": torch, "path": path})
    assert same(tmp_path / "weights.pt")
    assert path.read_bytes() == before


def test_a_module_of_ones_own_from_a_ckpt(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    torch.save(source.state_dict(), tmp_path / "last.ckpt")
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    pyint8.load(tmp_path / "last.ckpt", "cpu", model=module, dtype=torch.float32)
    assert torch.equal(module[1].weight, source[1].weight)


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_a_checkpoint_of_tensorflow(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(100) + bytes.fromhex("57fb808b247547db"))
    assert f"{name} holds TensorFlow weights; convert them to safetensors" in advice(tmp_path / name)


def test_a_ckpt_that_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"junk" * 30)
    text = advice(tmp_path / "x.ckpt", HeaderError)
    assert "TensorFlow" not in text
    assert "download the file again" in text


def test_a_folder_with_a_ckpt(tmp_path: Path) -> None:
    write_as(tmp_path / "model.ckpt")
    text = advice(tmp_path)
    assert "TensorFlow" not in text
    assert "but model.ckpt; for a module of your own, give its path" in text
    (tmp_path / "model.ckpt").rename(tmp_path / "model.ckpt.index")
    assert "model.ckpt.index holds TensorFlow weights" in advice(tmp_path)


# --- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_torch_named_safetensors(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "pytorch_model.safetensors"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=not legacy)
    assert "it is a file of PyTorch's; let its name end in .bin" in advice(path, HeaderError)
    path.rename(path.with_suffix(".bin"))
    assert same(tmp_path)


class Settings:
    """What a training script may have put beside its tensors."""


def test_what_wants_to_run_code_with_tied_weights(tmp_path: Path) -> None:
    """safetensors would refuse to save tensors that share memory."""
    path = tmp_path / "x.pt"
    torch.save({"model": {**TENSORS, "tied": TENSORS["a"]}, "settings": Settings()}, path)
    text = advice(path, CheckpointError)
    assert "torch.load(path, map_location='cpu', weights_only=False)" in text
    held = torch.load(path, map_location="cpu", weights_only=False)["model"]
    torch.save(held, tmp_path / "weights.pt")
    assert open_checkpoint(tmp_path / "weights.pt").keys() == held.keys()


def test_a_file_is_for_a_module_of_ones_own_only(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    with pytest.raises(OptionError, match=r"is a file; give the folder with its config\.json, or pass model=module"):
        pyint8.load(folder / "model.safetensors")
    assert pyint8.load(folder, "cpu") is not None


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(TENSORS["a"].tolist(), protocol=2))
    assert "download the file again" in advice(tmp_path / "x.ckpt", HeaderError)
    torch.save([1, 2], tmp_path / "y.pt")
    assert "it holds a list, not tensors by name; torch.save a dict of them" in advice(
        tmp_path / "y.pt", CheckpointError
    )
