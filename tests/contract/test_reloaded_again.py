"""A later `pyint8.reload` of a model plans nothing, as long as nothing has changed but values."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import state
from reloads import CPU, changed, logits
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import CheckpointError, NonFiniteWeightError, PartlyReplacedError
from pyint8.models.transformers import kept_plans, reloading

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were planned for."""
    paths: list[str] = []
    plan = reloading.plan_pretrained

    def counted(request: Any, *others: Any, **options: Any) -> Any:
        paths.append(Path(request.path).name)
        return plan(request, *others, **options)

    monkeypatch.setattr(reloading, "plan_pretrained", counted)
    return paths


def to_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME][3, 5] = torch.nan


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral", "whisper"])
def test_a_loop(name: str, plans: list[str], checkpoints: CheckpointStore, tmp_path: Path) -> None:
    one = checkpoints.folder(ZOO[name], "bf16")
    other = changed(one, tmp_path / "other", lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    model = pyint8.load(one, CPU)
    expected = {path: state(pyint8.load(path, CPU)) for path in (one, other)}
    assert expected[one] != expected[other]
    reports = []
    for path in (other, one, other, other, one):
        reports.append(pyint8.reload(model, path).to_dict())
        assert state(model) == expected[path]
    assert len(plans) == 1
    for field in ("checkpoint_bytes", "tensors", "quantized_by", "skipped", "skipped_bytes", "loading_info"):
        assert all(report[field] == reports[0][field] for report in reports)


def reworded(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"something": 1}))


def moved(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone())


CHANGES: dict[str, Callable[[Any, Path], dict[str, Any] | None]] = {
    "the configuration": lambda model, folder: reworded(folder),
    "a dtype": lambda model, folder: model.model.norm.to(torch.float32) and None,
    "the model's dtype": lambda model, folder: setattr(model.config, "dtype", torch.float32),
    "the memory": lambda model, folder: moved(model),
    "strictness": lambda model, folder: {"strict": False},
    "an argument": lambda model, folder: {"use_safetensors": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_planned_again(change: str, old: Path, new: Path, tmp_path: Path, plans: list[str]) -> None:
    first, later = (changed(new, tmp_path / name, lambda tensors: None) for name in ("first", "later"))
    model: Any = pyint8.load(old, CPU)
    pyint8.reload(model, first)
    options = CHANGES[change](model, later) or {}
    for _ in range(2):
        pyint8.reload(model, later, **options)
        assert plans == ["first", "later"]


def test_an_argument_that_was_changed_since(old: Path, new: Path, plans: list[str]) -> None:
    model, mapping = pyint8.load(old, CPU), {"^no_such_name": "none"}
    for key in ("a", "b"):
        mapping[key] = key
        pyint8.reload(model, new, key_mapping=mapping)
    assert len(plans) == 2


def test_the_same_mapping_in_another_order(old: Path, new: Path, plans: list[str]) -> None:
    """Of several patterns that fit a name, the first counts."""
    model, mapping = pyint8.load(old, CPU), {"^no_such_name": "none", "^no_such": "other"}
    for order in (mapping, dict(reversed(mapping.items())), dict(reversed(mapping.items()))):
        pyint8.reload(model, new, key_mapping=order)
    assert len(plans) == 2


def test_16_bit_and_int8_forms(old: Path, new: Path, tmp_path: Path, plans: list[str]) -> None:
    pyint8.convert(new, tmp_path / "int8", device="cpu")
    model, expected = pyint8.load(old, CPU), state(pyint8.load(new, CPU))
    for path in (new, tmp_path / "int8", tmp_path / "int8"):
        pyint8.reload(model, path)
        assert state(model) == expected
    assert plans == [new.name, "int8"]


def test_what_the_later_checkpoint_lacks_is_found(old: Path, new: Path, tmp_path: Path) -> None:
    lacking = changed(new, tmp_path / "lacking", lambda tensors: tensors.pop("model.norm.weight"))
    model = pyint8.load(old, CPU)
    pyint8.reload(model, new)
    with pytest.raises(CheckpointError, match=r"lacking/model\.safetensors has no values for model\.norm\.weight"):
        pyint8.reload(model, lacking)
    assert state(model) == state(pyint8.load(new, CPU))


def test_bad_values_are_those_of_the_later_checkpoint(old: Path, new: Path, tmp_path: Path) -> None:
    bad = changed(new, tmp_path / "bad", to_nan)
    model = pyint8.load(old, CPU)
    pyint8.reload(model, new)
    for _ in range(2):
        with pytest.raises(NonFiniteWeightError, match="row 3") as raised:
            pyint8.reload(model, bad)
        assert not isinstance(raised.value, PartlyReplacedError)
        assert raised.value.tensor == NAME
        assert raised.value.path == str(bad / "model.safetensors")
    pyint8.reload(model, old)
    assert state(model) == state(pyint8.load(old, CPU))


def test_a_plan_with_something_to_warn_of_is_made_each_time(
    old: Path, new: Path, tmp_path: Path, plans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    lacking = changed(new, tmp_path / "lacking", lambda tensors: tensors.pop("model.norm.weight"))
    model = pyint8.load(old, CPU)
    for times in (1, 2):
        pyint8.reload(model, lacking, strict=False)
        assert sum("left as they are: model.norm.weight" in line for line in caplog.messages) == times
    assert len(plans) == 2


def test_a_plan_lives_as_long_as_its_model(old: Path, new: Path) -> None:
    gc.collect()
    before = len(kept_plans._plans)
    model = pyint8.load(old, CPU)
    pyint8.reload(model, new)
    logits(model)
    assert len(kept_plans._plans) == before + 1
    del model
    gc.collect()
    assert len(kept_plans._plans) == before
