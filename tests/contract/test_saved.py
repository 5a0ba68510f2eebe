"""What `pyint8.save` writes: the files of `save_pretrained`, to the byte, and the same model again for everyone.

Where transformers cannot save (a model that it loaded from int8) the file is the one that the model was loaded from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import compare_outputs, differences, peer_load, show, state
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel, checkpoint_store

import pyint8

CPU = {"": "cpu"}
SHARDS = "60KB"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    return checkpoint_store(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(params=list(ZOO.values()), ids=list(ZOO))
def zoo_model(request: pytest.FixtureRequest) -> ZooModel:
    model: ZooModel = request.param
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def assert_same_state(ours: Any, theirs: Any) -> None:
    found = differences(state(ours), state(theirs), allow=["*/attributes/*"])
    assert not found, show(found)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_it_is_what_save_pretrained_writes_and_loads_everywhere(
    zoo_model: ZooModel, store: CheckpointStore, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = pyint8.load(store.folder(zoo_model, "bf16"), CPU, model=zoo_model.cls)
    pyint8.save(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "whole") == files(tmp_path / "theirs")
    pyint8.save(model, tmp_path / "ours", max_shard_size=SHARDS)
    again = pyint8.load(tmp_path / "ours", CPU, model=type(model))
    assert_same_state(again, model)
    with zoo_model.peer_help():
        peer, info = peer_load(tmp_path / "ours", type(model), device_map=CPU, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(peer, model)
    found = compare_outputs(again, model, zoo_model.inputs(model))
    assert not found, show(found)


def test_weights_that_transformers_splits_on_loading_are_saved_so_that_they_load(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    sixteen = Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True)).to(torch.bfloat16)
    sixteen.save_pretrained(tmp_path / "source")
    model = pyint8.load(tmp_path / "source", CPU)
    pyint8.save(model, tmp_path / "int8")
    assert_same_state(pyint8.load(tmp_path / "int8", CPU), model)
    peer, info = peer_load(tmp_path / "int8", Dinov2Model, device_map=CPU, dtype="auto")
    assert not info["missing_keys"]
    assert_same_state(peer, model)


def test_what_was_loaded_from_int8_is_saved_as_it_was(
    zoo_model: ZooModel, store: CheckpointStore, tmp_path: Path
) -> None:
    if zoo_model.name == "bert_fresh_head":
        pytest.skip("transformers cannot load it: see the zoo")
    source = store.folder(zoo_model, PREQUANTIZED)
    with zoo_model.peer_help():
        peer, _ = peer_load(source, zoo_model.cls, device_map=CPU, dtype="auto")
    pyint8.save(peer, tmp_path / "peers")
    pyint8.save(pyint8.load(source, CPU, model=type(peer)), tmp_path / "ours")
    stored = tensors(source)
    for folder in (tmp_path / "peers", tmp_path / "ours"):
        saved = tensors(folder)
        assert saved.keys() == stored.keys()
        assert all(torch.equal(saved[name], value) for name, value in stored.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shards_are_those_of_save_pretrained(name: str, store: CheckpointStore, tmp_path: Path) -> None:
    """But for experts that are saved one by one: there it counts the first of those in one tensor only."""
    model = pyint8.load(store.folder(ZOO[name], "bf16"), CPU)
    pyint8.save(model, tmp_path / "ours", max_shard_size="40KB")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_has_run_is_saved_as_before(name: str, store: CheckpointStore, tmp_path: Path) -> None:
    model = pyint8.load(store.folder(ZOO[name], "bf16"), CPU)
    pyint8.save(model, tmp_path / "before")
    with torch.no_grad():
        model(**ZOO[name].inputs(model))  # bitsandbytes moves codes and scales into the modules' state
    pyint8.save(model, tmp_path / "after")
    assert files(tmp_path / "before") == files(tmp_path / "after")
