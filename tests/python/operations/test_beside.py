"""`save` and `convert` beside the checkpoint that a model is from: they keep it, and carry along what lies there."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from plain_models import Net, drawn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import OptionError
from pyint8.operations.cached import wait_for_fills

CPU = {"": "cpu"}


@pytest.fixture
def llama(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama"], "bf16")


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


def by_transformers(folder: Any, **where: Any) -> Any:
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


@pytest.mark.parametrize("kind", ["gone", "damaged"])
def test_what_is_lost_already_can_be_saved_over(root: Path, kind: str) -> None:
    model = pyint8.load(root, CPU)
    (root / "model.safetensors").unlink()
    if kind == "damaged":
        (root / "model.safetensors").write_bytes(b"no header")
    pyint8.save(model, root)
    assert are_int8(root)


def test_a_form_of_the_cache_is_not_saved_over_its_source(root: Path, tmp_path: Path) -> None:
    for _ in range(2):
        model, report = pyint8.load(root, CPU, cache=tmp_path / "cache", return_report=True)
        assert wait_for_fills(60)
    assert report.from_cache
    with pytest.raises(OptionError, match="loaded from"):
        pyint8.save(model, root)


def test_a_module_of_ones_own_is_not_saved_over_its_source(tmp_path: Path) -> None:
    save_file(drawn(Net()).state_dict(), tmp_path / "model.safetensors")
    net = pyint8.load(tmp_path, "cpu", model=Net().eval())
    with pytest.raises(OptionError, match="loaded from"):
        pyint8.save(net, tmp_path)
    assert not are_int8(tmp_path)


# --- what lies beside -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(root: Path, tmp_path: Path) -> Path:
    """A cache of the hub's, where a repository has two revisions, and the other one's tokenizer is another."""
    repository = tmp_path / "hub" / "models--me--tiny"
    for revision, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        snapshot = shutil.copytree(root, repository / "snapshots" / commit)
        (snapshot / "tokenizer_config.json").write_text(f'{{"of": "{revision}"}}')
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return tmp_path / "hub"


def saved(source: Any, folder: Path, **where: Any) -> str:
    pyint8.save(pyint8.load(source, CPU, **where), folder)
    return (folder / "tokenizer_config.json").read_text()


def saved_by_transformers(source: Any, folder: Path, **where: Any) -> str:
    pyint8.save(within_takeover(source, **where), folder)
    return (folder / "tokenizer_config.json").read_text()


def converted(source: Any, folder: Path, **where: Any) -> str:
    pyint8.convert(source, folder, device="cpu", **where)
    return (folder / "tokenizer_config.json").read_text()


def saved_from_the_cache(source: Any, folder: Path, **where: Any) -> str:
    for _ in range(2):
        model, report = pyint8.load(source, CPU, cache=folder.parent / "cache", return_report=True, **where)
        assert wait_for_fills(60)
    assert report.from_cache
    pyint8.save(model, folder)
    return (folder / "tokenizer_config.json").read_text()


WRITERS = pytest.mark.parametrize("write", [saved, saved_by_transformers, converted, saved_from_the_cache])


@WRITERS
def test_of_a_folder_inside_its_own_goes_along(root: Path, tmp_path: Path, write: Any) -> None:
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    assert write(root, tmp_path / "int8", subfolder="sub") == '{"of": "sub"}'
    assert metadata_load(tmp_path / "int8" / "README.md")["license"] == "mit"


@WRITERS
def test_of_a_revision_its_own_goes_along(hub: Path, tmp_path: Path, write: Any) -> None:
    where = {"cache_dir": str(hub), "local_files_only": True}
    assert write("me/tiny", tmp_path / "main", **where) == '{"of": "main"}'
    assert write("me/tiny", tmp_path / "v2", revision="v2", **where) == '{"of": "v2"}'


def test_a_folder_is_found_from_elsewhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    model = pyint8.load("root", CPU)
    monkeypatch.chdir(root / "sub")
    pyint8.save(model, tmp_path / "int8")
    assert (tmp_path / "int8" / "tokenizer_config.json").read_text() == '{"of": "root"}'
    with pytest.raises(OptionError, match="loaded from"):
        pyint8.save(model, "../../root")


def test_a_copy_has_its_name(root: Path, tmp_path: Path) -> None:
    pyint8.save(copy.deepcopy(pyint8.load(root, CPU)), tmp_path / "int8")
    assert (tmp_path / "int8" / "tokenizer_config.json").read_text() == '{"of": "root"}'


@pytest.mark.parametrize("what", ["no such folder", "not downloaded", "nothing there"])
def test_what_is_not_saved_is_said(
    hub: Path, root: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "not downloaded":
        (hub / "models--me--tiny" / "snapshots" / ("1" * 40) / "tokenizer_config.json").unlink()
        model = pyint8.load("me/tiny", CPU, cache_dir=str(hub), local_files_only=True)
    else:
        (root / "tokenizer_config.json").unlink()
        model = pyint8.load(root, CPU)
    if what == "no such folder":
        shutil.rmtree(root)
    with caplog.at_level(logging.WARNING, "pyint8"):
        pyint8.save(model, tmp_path / "int8")
    assert caplog.text.count("no tokenizer is saved") == (what != "nothing there")
