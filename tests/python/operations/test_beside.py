"""`save` and `convert` beside the checkpoint that a model is from: they keep it, and carry along what lies there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import Net, drawn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from zoo import ZOO, checkpoint_store

import pyint8
from pyint8.errors import OptionError

CPU = {"": "cpu"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_store(tmp_path_factory.mktemp("checkpoints")).folder(ZOO["llama"], "bf16")


@pytest.fixture
def root(llama: Path, tmp_path: Path) -> Path:
    """A folder with a checkpoint, and another one in its folder "sub"."""
    for folder in (tmp_path / "root", tmp_path / "root" / "sub"):
        shutil.copytree(llama, folder, dirs_exist_ok=True)
        (folder / "tokenizer_config.json").write_text(f'{{"of": "{folder.name}"}}')
    return tmp_path / "root"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def are_int8(folder: Path) -> bool:
    return torch.int8 in {value.dtype for value in load_file(folder / "model.safetensors").values()}


# --- the source stays -------------------------------------------------------------------------------------------------


def test_a_folder_inside_is_not_converted_into_itself(root: Path) -> None:
    before = content(root / "sub")
    with pytest.raises(OptionError, match="the source itself"):
        pyint8.convert(root, root / "sub", device="cpu", subfolder="sub")
    assert content(root / "sub") == before


def test_a_folder_inside_is_converted_into_the_one_around_it(root: Path) -> None:
    before = content(root / "sub")
    pyint8.convert(root, root, device="cpu", subfolder="sub")
    assert are_int8(root)
    assert content(root / "sub") == before


@pytest.mark.parametrize("target", ["", "weights"])
def test_weights_that_the_configuration_names_stay(root: Path, target: str) -> None:
    (root / "weights").mkdir()
    (root / "model.safetensors").rename(root / "weights" / "model.safetensors")
    config = (root / "config.json").read_text()
    (root / "config.json").write_text(config.replace("{", '{"transformers_weights": "weights/model.safetensors",', 1))
    model = pyint8.load(root, CPU)
    for write in (lambda: pyint8.convert(root, root / target, device="cpu"), lambda: pyint8.save(model, root / target)):
        with pytest.raises(OptionError, match="would be lost"):
            write()
    assert not are_int8(root / "weights")


def test_what_links_lead_to_stays(llama: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in root.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    with pytest.raises(OptionError, match="would be lost"):
        pyint8.convert(tmp_path / "links", root, device="cpu")
    with pytest.raises(OptionError, match="would be lost"):
        pyint8.save(pyint8.load(tmp_path / "links", CPU), root)
    assert content(root)["model.safetensors"] == (llama / "model.safetensors").read_bytes()


def by_pyint8(folder: Path, **where: Any) -> Any:
    return pyint8.load(folder, CPU, **where)


def by_transformers(folder: Path, **where: Any) -> Any:
    config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, device_map=CPU, quantization_config=config, **where)


def within_takeover(folder: Path, **where: Any) -> Any:
    with pyint8.takeover():
        return by_transformers(folder, **where)


@pytest.mark.parametrize("load", [by_pyint8, by_transformers, within_takeover])
def test_a_model_is_not_saved_over_its_source(root: Path, load: Any) -> None:
    before = content(root)
    with pytest.raises(OptionError, match="loaded from"):
        pyint8.save(load(root), root)
    assert content(root) == before


@pytest.mark.parametrize("load", [by_pyint8, within_takeover])
def test_nor_over_a_source_inside_of_a_folder(root: Path, load: Any) -> None:
    model, before = load(root, subfolder="sub"), content(root / "sub")
    with pytest.raises(OptionError, match="loaded from"):
        pyint8.save(model, root / "sub")
    assert content(root / "sub") == before


def test_nor_over_what_it_was_reloaded_from(root: Path) -> None:
    model, before = pyint8.load(root, CPU), content(root / "sub")
    pyint8.reload(model, root, subfolder="sub")
    with pytest.raises(OptionError, match="loaded from"):
        pyint8.save(model, root / "sub")
    assert content(root / "sub") == before


def test_an_int8_model_is_saved_over_itself(llama: Path, tmp_path: Path) -> None:
    pyint8.convert(llama, tmp_path / "int8", device="cpu")
    before = content(tmp_path / "int8")["model.safetensors"]
    model = pyint8.load(tmp_path / "int8", CPU)
    pyint8.save(model, tmp_path / "int8")
    pyint8.save(model, tmp_path / "int8")
    assert content(tmp_path / "int8")["model.safetensors"] == before


def test_a_module_of_ones_own_is_not_saved_over_its_source(tmp_path: Path) -> None:
    save_file(drawn(Net()).state_dict(), tmp_path / "model.safetensors")
    net = pyint8.load(tmp_path, "cpu", model=Net().eval())
    with pytest.raises(OptionError, match="loaded from"):
        pyint8.save(net, tmp_path)
    assert not are_int8(tmp_path)
