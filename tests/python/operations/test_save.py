"""`pyint8.save`: plain modules, what lies beside the weights, what is refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from huggingface_hub import metadata_load
from plain_models import ALL, IDS, Net, drawn
from safetensors.torch import save_file, save_model
from small_disk import on_a_small_disk
from torch import nn
from zoo import ZOO, checkpoint_store

import pyint8
from pyint8.errors import CheckpointError, ModelNotSupportedError, OptionError, WriteError

CPU = {"": "cpu"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, a licence and a card."""
    folder = checkpoint_store(tmp_path_factory.mktemp("checkpoints")).folder(ZOO["llama"], "bf16")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("mine")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: de\ntags: [tiny]\nbase_model: a/b\n---\n# Tiny\n")
    return folder


@pytest.fixture
def model(llama: Path) -> Any:
    return pyint8.load(llama, CPU)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    one, other = values(ours), values(theirs)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- plain modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", 4000])
def test_a_plain_module_comes_back(tmp_path: Path, tied: bool, size: int | str) -> None:
    save_model(drawn(Net(tied=tied)), str(tmp_path / "net.safetensors"))
    net = pyint8.load(tmp_path / "net.safetensors", "cpu", model=Net(tied=tied).eval())
    pyint8.save(net, tmp_path / "int8", max_shard_size=size)
    assert (len(list((tmp_path / "int8").glob("*.safetensors"))) > 1) == (size != "5GB")
    again = pyint8.load(tmp_path / "int8", "cpu", model=Net(tied=tied).eval())
    assert_equal(again, net)
    assert (again.head.weight is again.embed.weight) == tied
    with torch.no_grad():
        assert torch.equal(again(IDS), net(IDS))


@pytest.mark.parametrize("keep", ["host memory", "files"])
def test_tensors_that_accelerate_keeps_elsewhere_are_saved_too(tmp_path: Path, keep: str) -> None:
    save_file(drawn(Net()).state_dict(), tmp_path / "net.safetensors")
    net = pyint8.load(tmp_path / "net.safetensors", "cpu", model=Net().eval())
    cpu_offload(net.embed) if keep == "host memory" else disk_offload(net.embed, tmp_path / "offload")
    assert net.embed.weight.is_meta
    pyint8.save(net, tmp_path / "int8")
    assert net.embed.weight.is_meta
    again = pyint8.load(tmp_path / "int8", "cpu", model=Net().eval())
    assert torch.equal(again.embed.weight, drawn(Net()).embed.weight)


def test_values_that_are_nowhere_are_no_zeros(tmp_path: Path) -> None:
    save_file(drawn(Net()).state_dict(), tmp_path / "net.safetensors")
    net = pyint8.load(tmp_path / "net.safetensors", "cpu", model=Net().eval())
    net.embed.to("meta")
    with pytest.raises(CheckpointError, match="no values") as raised:
        pyint8.save(net, tmp_path / "int8")
    assert raised.value.tensor == "embed.weight"


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_what_is_wrapped_is_saved_by_its_own_names(tmp_path: Path, wrap: Any) -> None:
    save_file(drawn(Net()).state_dict(), tmp_path / "net.safetensors")
    net = pyint8.load(tmp_path / "net.safetensors", "cpu", model=Net().eval(), config=ALL)
    pyint8.save(wrap(net), tmp_path / "int8")
    assert_equal(pyint8.load(tmp_path / "int8", "cpu", model=Net().eval(), config=ALL), net)


# --- beside the weights -----------------------------------------------------------------------------------------------


def test_what_lies_beside_the_weights_goes_along(model: Any, tmp_path: Path) -> None:
    pyint8.save(model, tmp_path / "int8")
    assert sorted(os.listdir(tmp_path / "int8")) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    card = metadata_load(tmp_path / "int8" / "README.md")
    assert card == {
        "library_name": "transformers",
        "license": "mit",
        "language": "de",
        "base_model": "a/b",
        "base_model_relation": "quantized",
        "tags": ["tiny", "int8", "8-bit", "bitsandbytes", "pyint8"],
    }


def test_the_card_names_the_hub_id_and_no_path(model: Any, tmp_path: Path) -> None:
    model.name_or_path = "someone/tiny"
    pyint8.save(model, tmp_path / "int8")
    assert metadata_load(tmp_path / "int8" / "README.md")["base_model"] == "someone/tiny"
    model.name_or_path = str(tmp_path / "gone" / "secret" / "tiny")
    pyint8.save(model, tmp_path / "other")
    text = (tmp_path / "other" / "README.md").read_text()
    assert "secret" not in text
    assert "base_model" not in metadata_load(tmp_path / "other" / "README.md")


def test_a_card_that_is_there_stays_and_old_shards_go(model: Any, tmp_path: Path) -> None:
    pyint8.save(model, tmp_path / "int8", max_shard_size="40KB")
    (tmp_path / "int8" / "README.md").write_text("mine")
    (tmp_path / "int8" / "notes").write_text("mine")
    pyint8.save(model, tmp_path / "int8")
    names = os.listdir(tmp_path / "int8")
    assert [name for name in names if name.startswith("model")] == ["model.safetensors"]
    assert (tmp_path / "int8" / "README.md").read_text() == (tmp_path / "int8" / "notes").read_text() == "mine"


def test_the_model_is_as_it_was(model: Any, tmp_path: Path) -> None:
    model.config.architectures = None
    before = model.config.to_dict()
    pyint8.save(model, tmp_path / "int8")
    assert model.config.to_dict() == before
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_refusal_of_the_system_leaves_what_was_there(model: Any, tmp_path: Path) -> None:
    pyint8.save(model, tmp_path / "int8")
    before = {path.name: path.read_bytes() for path in (tmp_path / "int8").iterdir()}
    with files_of_at_most(20_000), pytest.raises(WriteError) as raised:
        pyint8.save(model, tmp_path / "int8", max_shard_size="1GB")
    assert raised.value.errno == errno.EFBIG
    assert raised.value.tensor is not None
    assert {path.name: path.read_bytes() for path in (tmp_path / "int8").iterdir()} == before
    assert os.listdir(tmp_path) == ["int8"]


@pytest.mark.parametrize(
    ("size", "found"), [("big", "max_shard_size"), (0, "max_shard_size"), (True, "max_shard_size"), (1.5, "max_shard")]
)
def test_sizes_that_are_none(model: Any, tmp_path: Path, size: Any, found: str) -> None:
    with pytest.raises(OptionError, match=found):
        pyint8.save(model, tmp_path / "int8", max_shard_size=size)
    assert not os.listdir(tmp_path)


def test_what_is_not_int8_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupportedError, match="nothing in this Linear is int8"):
        pyint8.save(nn.Linear(2, 2), tmp_path / "int8")
    sixteen = pyint8.load(llama, CPU, config=pyint8.Int8Config(has_fp16_weight=True))
    with pytest.raises(ModelNotSupportedError, match="not quantized"):
        pyint8.save(sixteen, tmp_path / "int8")
    with pytest.raises(OptionError, match="must be an int8 model"):
        pyint8.save("model", tmp_path / "int8")  # type: ignore[arg-type]
    assert not os.listdir(tmp_path)


def test_adapters_are_not_the_model(model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(OptionError, match="unload"):
        pyint8.save(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tmp_path / "int8")


def test_added_adapters_are_not_the_model(model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelNotSupportedError, match="adapters"):
        pyint8.save(model, tmp_path / "int8")


@pytest.mark.parametrize("folder", ["", 3])
def test_folders_that_are_none(model: Any, folder: Any) -> None:
    with pytest.raises(OptionError, match="folder"):
        pyint8.save(model, folder)


def test_a_full_disk(llama: Path, tmp_path: Path) -> None:
    ran = on_a_small_disk(tmp_path, f'pyint8.save(pyint8.load("{llama}", "cpu"), f"{{disk}}/int8")', size="64k")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith(f"{errno.ENOSPC}|tensor '"), ran.stdout
    assert len(ran.stdout.splitlines()) == 1, "files were left"


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """Of huggingface_hub's HfApi, what a push calls."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.made: list[Any] = []
        self.uploaded: list[Any] = []

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self.made.append((repository, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
        assert self.made
        if self.fails is not None:
            raise self.fails
        self.uploaded.append((repo_id, sorted(os.listdir(folder_path))))
        return f"https://hub/{repo_id}"


def test_a_save_is_pushed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    with caplog.at_level("INFO", logger="pyint8"):
        pyint8.save(model, tmp_path / "int8", push_to_hub="me/int8", private=True)
    assert hub.made == [("me/int8", True, True)]
    assert hub.uploaded == [("me/int8", sorted(os.listdir(tmp_path / "int8")))]
    assert "https://hub/me/int8" in caplog.text


def test_a_push_that_fails_leaves_what_was_saved(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(fails=OSError("the network is gone"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    with pytest.raises(WriteError, match=r"network is gone; the folder is complete.*`hf upload me/int8 "):
        pyint8.save(model, tmp_path / "int8", push_to_hub="me/int8")
    assert (tmp_path / "int8" / "model.safetensors").exists()


def test_what_names_no_repository_is_refused_before_the_work(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'a/b/c' names no repository"):
        pyint8.save(model, tmp_path / "int8", push_to_hub="a/b/c")
    assert not (tmp_path / "int8").exists()
