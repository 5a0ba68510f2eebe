"""Shards that do not agree with their index: what the model does not want is told once, what it wants and cannot have
refused, and of two copies the index's counts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from oracle import compare_models, show
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import PREQUANTIZED

import pyint8
from pyint8.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q_PROJ, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
LENIENT = "strict=False"
Tensors = dict[str, torch.Tensor]
Copy = Callable[..., Path]


def shard(folder: Path) -> Path:
    """Its one file as two, every other tensor in each, with an index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    parts = {ONE: names[::2], TWO: names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def edit_shard(folder: Path, file: str, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def shard_of(folder: Path, name: str) -> str:
    file: str = json.loads((folder / INDEX).read_text())["weight_map"][name]
    return file


def take_out(folder: Path, name: str) -> None:
    edit_shard(folder, shard_of(folder, name), lambda tensors: tensors.pop(name))


def move(folder: Path, name: str) -> None:
    """To the other shard; the index is not told."""
    here = shard_of(folder, name)
    tensor = load_file(folder / here)[name]
    take_out(folder, name)
    edit_shard(folder, ONE if here == TWO else TWO, lambda tensors: tensors.update({name: tensor}))


def unname(folder: Path, name: str) -> None:
    edit_index(folder, lambda weight_map: weight_map.pop(name))


def double(folder: Path, name: str) -> None:
    """A copy with other values in the other shard."""
    here = shard_of(folder, name)
    tensor = torch.zeros_like(load_file(folder / here)[name])
    edit_shard(folder, ONE if here == TWO else TWO, lambda tensors: tensors.update({name: tensor}))


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))


def load(folder: Path, *, strict: bool = True, **kwargs: Any) -> Any:
    return pyint8.load(folder, "cpu", dtype=torch.float16, strict=strict, **kwargs)


def drop_in(folder: Path, *, strict: bool = True) -> Any:
    kwargs: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float16}
    config = pyint8.Int8Config(strict=strict)
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def fill(folder: Path, *, strict: bool = True, module: Callable[[], nn.Module] = module) -> Any:
    return load(folder, model=module(), config=pyint8.Int8Config(skip_modules=[], strict=strict))


class Road:
    """A way to load, the folder that it loads, and names of tensors in it that the model wants."""

    def __init__(self, way: Callable[..., Any], folder: Path, weight: str, norm: str) -> None:
        self.load, self.folder, self.weight, self.norm = way, folder, weight, norm


@pytest.fixture(params=["load", "drop-in", "plain"])
def road(request: pytest.FixtureRequest, copy_of: Copy, tmp_path: Path) -> Road:
    if request.param != "plain":
        way = load if request.param == "load" else drop_in
        return Road(way, shard(copy_of("llama", "bf16")), Q_PROJ, NORM)
    save_file(module().state_dict(), tmp_path / SINGLE, {"format": "pt"})
    return Road(fill, shard(tmp_path), "0.weight", "1.weight")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "it is loaded all the same" in text]


def require_same(model: Any, other: Any) -> None:
    if isinstance(model, tf.PreTrainedModel):
        found = compare_models(model, other)
        assert not found, show(found)
    else:
        assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())


# --- what the model does not want -------------------------------------------------------------------------------------


def nowhere(folder: Path) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({"mtp.fc.weight": ONE}))


def not_named(folder: Path) -> None:
    edit_shard(folder, TWO, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(3)}))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("lie", [nowhere, not_named])
def test_a_left_over(road: Road, lie: Callable[[Path], None], strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    expected = road.load(road.folder)
    assert told(caplog) == []
    lie(road.folder)
    require_same(road.load(road.folder, strict=strict), expected)
    (text,) = told(caplog)
    assert "tensor 'mtp.fc.weight'" in text
    assert str(road.folder / INDEX) in text


def test_many_left_overs_are_one_warning(road: Road, caplog: pytest.LogCaptureFixture) -> None:
    edit_index(road.folder, lambda weight_map: weight_map.update({f"mtp.{i}.weight": ONE for i in range(9)}))
    not_named(road.folder)
    road.load(road.folder)
    (text,) = told(caplog)
    assert "tensor 'mtp.0.weight'" in text
    assert "The same is true of 9 others, such as mtp.1.weight" in text


def test_what_is_tied_to_what_is_there(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = shard(copy_of("llama_tied", "bf16"))
    expected = load(folder)
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": ONE}))
    require_same(load(folder), expected)
    assert len(told(caplog)) == 1


def test_what_is_tied_in_a_module_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def tied() -> nn.Module:
        made = module()
        made[2].weight = made[0].weight  # type: ignore[index]
        return made

    state = tied().state_dict()
    del state["2.weight"]
    save_file(state, tmp_path / SINGLE)
    shard(tmp_path)
    edit_index(tmp_path, lambda weight_map: weight_map.update({"2.weight": TWO}))
    fill(tmp_path, module=tied)
    assert len(told(caplog)) == 1


def test_another_name_of_what_is_there(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    """transformers would file it under the same parameter."""
    folder = shard(copy_of("llama", "bf16"))
    expected = load(folder)
    edit_index(folder, lambda weight_map: weight_map.update({"norm.weight": ONE}))
    require_same(load(folder), expected)
    assert len(told(caplog)) == 1


def test_the_format_of_an_int8_weight_is_not_needed(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = shard(copy_of("llama", PREQUANTIZED))
    expected = load(folder)
    take_out(folder, Q_PROJ.replace(".weight", ".weight_format"))
    require_same(load(folder), expected)
    assert len(told(caplog)) == 1


# --- what it wants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["weight", "norm"])
def test_what_no_shard_has(road: Road, which: str, caplog: pytest.LogCaptureFixture) -> None:
    name = getattr(road, which)
    file = shard_of(road.folder, name)
    take_out(road.folder, name)
    with pytest.raises(
        CheckpointError, match=r"no shard has it; .*: download them again; or load without it"
    ) as caught:
        road.load(road.folder)
    assert (caught.value.tensor, caught.value.path) == (name, str(road.folder / file))
    assert LENIENT in str(caught.value)
    model = road.load(road.folder, strict=False)
    assert not model.get_parameter(name).is_meta
    (text,) = told(caplog)
    assert f"tensor {name!r}" in text


@pytest.mark.parametrize("lie", [move, unname])
@pytest.mark.parametrize("which", ["weight", "norm"])
def test_what_is_not_where_the_index_says(
    road: Road, which: str, lie: Callable[[Path, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = road.load(road.folder)
    name = getattr(road, which)
    lie(road.folder, name)
    with pytest.raises(
        CheckpointError, match=r"download them again; or take it as it is, as transformers does"
    ) as caught:
        road.load(road.folder)
    assert caught.value.tensor == name
    assert LENIENT in str(caught.value)
    require_same(road.load(road.folder, strict=False), expected)
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("which", ["weight", "norm"])
def test_of_two_copies_the_one_that_the_index_names(
    road: Road, which: str, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    expected = road.load(road.folder)
    name = getattr(road, which)
    double(road.folder, name)
    require_same(road.load(road.folder, strict=strict), expected)
    (text,) = told(caplog)
    assert f"tensor {name!r}" in text


def test_two_copies_that_the_index_does_not_name(road: Road) -> None:
    is_last = shard_of(road.folder, road.norm) == TWO
    double(road.folder, road.norm)
    unname(road.folder, road.norm)
    with pytest.raises(CheckpointError, match="does not name this tensor") as caught:
        road.load(road.folder)
    assert caught.value.tensor == road.norm
    norm = road.load(road.folder, strict=False).get_parameter(road.norm)
    assert norm.any() == is_last  # as transformers takes it; the copy is of zeros


# --- what strict=False does not help ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_a_module_on_meta_holds_no_values_to_go_on_with(tmp_path: Path, strict: bool) -> None:
    save_file(module().state_dict(), tmp_path / SINGLE)
    shard(tmp_path)
    take_out(tmp_path, "1.weight")
    with torch.device("meta"):
        empty = module()
    with pytest.raises(CheckpointError, match=r"no shard has it; .*download them again$") as caught:
        fill(tmp_path, strict=strict, module=lambda: empty)
    assert caught.value.tensor == "1.weight"


def test_one_of_many_experts(copy_of: Copy) -> None:
    folder = shard(copy_of("mixtral", "bf16"))
    name = next(name for name in load_file(folder / ONE) if ".experts." in name)
    take_out(folder, name)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"no shard has it; .*download them again$") as caught:
            load(folder, strict=strict)
        assert caught.value.tensor == name


@pytest.mark.parametrize("strict", [True, False])
def test_the_scales_of_an_int8_weight(copy_of: Copy, strict: bool) -> None:
    folder = shard(copy_of("llama", PREQUANTIZED))
    name = Q_PROJ.replace(".weight", ".SCB")
    take_out(folder, name)
    with pytest.raises(CheckpointError, match=r"no shard has it; .*download them again$") as caught:
        load(folder, strict=strict)
    assert caught.value.tensor == name


# --- Int8Config's own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strict", "of_config"), [(True, False), (False, True), (False, False)])
def test_lenient_if_either_says_so(copy_of: Copy, strict: bool, of_config: bool) -> None:
    folder = shard(copy_of("llama", "bf16"))
    unname(folder, NORM)
    load(folder, strict=strict, config=pyint8.Int8Config(strict=of_config))


def test_bad_values_too(copy_of: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = shard(copy_of("llama", "bf16"))
    edit_shard(folder, shard_of(folder, Q_PROJ), lambda tensors: tensors[Q_PROJ][3, 4].fill_(torch.nan))
    with caplog.at_level(logging.WARNING, "pyint8"):
        drop_in(folder, strict=False)
    assert "NaN" in caplog.text


def test_it_is_not_saved(copy_of: Copy, tmp_path: Path) -> None:
    drop_in(shard(copy_of("llama", "bf16")), strict=False).save_pretrained(tmp_path / "saved")
    assert "strict" not in pyint8.Int8Config(strict=False).to_dict()
    assert "strict" not in (tmp_path / "saved" / "config.json").read_text()
