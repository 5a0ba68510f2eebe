"""Adapters of PEFT: a folder, or a repository, that holds nothing but what goes on top of another model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from oracle import SERIALIZABLE, compare_models, compare_outputs, show
from packaging.version import Version
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import MissingDependencyError, ModelNotSupportedError

INPUTS = ZOO["llama"].inputs
TRANSFORMERS = Version(transformers.__version__)

# Of transformers, whoever loads: of its releases the matrix runs more than those that can do everything.
takes_this_peft = pytest.mark.skipif(
    Version("5.24") <= TRANSFORMERS and Version(peft.__version__) < Version("0.22"),
    reason="transformers wants a newer PEFT",
)
finds_subfolders = pytest.mark.skipif(Version("5.23") > TRANSFORMERS, reason="transformers does not look there yet")


@pytest.fixture
def base(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama"], "bf16")


def save_adapter(base: Path, folder: Path) -> None:
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(folder)


def check_adapter(path: Any, base: Path, **where: Any) -> None:
    """Both ways to load `path` give the base model with the adapter."""
    kwargs: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float16, **where}
    int8 = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=int8, **kwargs)
    ours = pyint8.load(path, **kwargs)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE]) + compare_outputs(ours, theirs, INPUTS(theirs))
    assert not found, show(found)
    assert compare_outputs(ours, pyint8.load(base, "cpu"), INPUTS(theirs))
    assert ours.active_adapters() == theirs.active_adapters()


@takes_this_peft
def test_an_adapter_brings_its_base_model(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path)
    check_adapter(tmp_path, base)


@takes_this_peft
@pytest.mark.parametrize(
    "more",
    [
        {"adapter_name": "mine"},
        pytest.param({"adapter_kwargs": {"subfolder": "deeper"}}, marks=finds_subfolders),
    ],
    ids=str,
)
def test_what_is_said_of_an_adapter_counts(more: dict[str, Any], base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "deeper" if "adapter_kwargs" in more else tmp_path)
    check_adapter(tmp_path, base, **more)


@takes_this_peft
def test_an_adapter_may_be_with_its_model(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "both")
    save_adapter(base, folder)
    shutil.copy(base / "config.json", folder)
    check_adapter(folder, base)


@takes_this_peft
def test_an_adapter_of_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--people--lora" / "snapshots" / ("4" * 40)
    save_adapter(base, snapshot)
    (tmp_path / "models--people--lora" / "refs").mkdir()
    (tmp_path / "models--people--lora" / "refs" / "main").write_text("4" * 40)
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    # transformers looks for the adapter's weights in the cache that the environment names
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    check_adapter("people/lora", base, **where, adapter_kwargs={"cache_dir": str(tmp_path)})


@pytest.mark.parametrize("content", ["{}", '{"base_model_name_or_path": null}', "[]", "{"])
def test_an_adapter_without_a_base_model(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelNotSupportedError, match=r"names no base model; load that.*model\.load_adapter\("):
        pyint8.load(tmp_path)


def test_an_adapter_without_peft_asks_for_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(base, tmp_path)
    monkeypatch.setattr("pyint8.checkpoint.find.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=f"{tmp_path} holds a PEFT adapter.*`pip install peft`"):
        pyint8.load(tmp_path, "cpu")
