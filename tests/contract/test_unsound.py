"""`pyint8.verify` of checkpoints that are not sound: all that is wrong is listed, with its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reloads import changed
from safetensors.torch import load_file

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import ReadError
from pyint8.models import verifying
from pyint8.streaming.stream import TensorStream

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def found(path: Path, **options: Any) -> list[tuple[str | None, str]]:
    return [(each.tensor, each.problem) for each in pyint8.verify(path, **options).findings]


def damaged(int8: Path, folder: Path, **tensors: Any) -> Path:
    """A copy with some tensors changed, or None for gone."""

    def change(own: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if value is None:
                del own[name]
            else:
                own[name] = value(own[name]) if name in own else value(None)

    return changed(int8, folder, change)


def in_place(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def test_all_that_is_wrong_is_listed(int8: Path, tmp_path: Path) -> None:
    folder = damaged(
        int8,
        tmp_path / "bad",
        **{
            f"{UP}.SCB": in_place((3,), float("nan")),
            f"{DOWN}.SCB": in_place((5,), float("inf")),
            "model.layers.1.self_attn.q_proj.SCB": lambda value: value[:-1].clone(),
            "model.layers.1.self_attn.k_proj.SCB": None,
            "model.layers.1.self_attn.v_proj.weight_format": lambda value: value + 2,
            "model.layers.0.self_attn.v_proj.weight": None,
            "model.layers.0.self_attn.q_proj.SCB": lambda value: -value,
        },
    )
    result = pyint8.verify(folder)
    problems = {each.tensor: each for each in result.findings}
    expected = {
        f"{UP}.SCB": "1 of its 96 scales",
        f"{DOWN}.SCB": "1 of its 64 scales",
        "model.layers.1.self_attn.q_proj.weight": "its scales",
        "model.layers.1.self_attn.k_proj.weight": "an int8 weight without its scales",
        "model.layers.1.self_attn.v_proj.weight_format": "its weight_format is 2",
        "model.layers.0.self_attn.v_proj.SCB": "it belongs to model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.v_proj.weight_format": "it belongs to model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.q_proj.SCB": "64 of its 64 scales",
    }
    assert problems.keys() == expected.keys()
    assert not [name for name, words in expected.items() if not problems[name].problem.startswith(words)]
    entry = open_checkpoint(folder)[f"{UP}.SCB"]
    assert problems[f"{UP}.SCB"].offset == entry.offset + 4 * 3
    assert problems[f"{UP}.SCB"].path == entry.path == str(folder / "model.safetensors")
    assert [each.offset or 0 for each in result.findings] == sorted(each.offset or 0 for each in result.findings)


def test_other_bytes_than_the_source_s(int8: Path, source: Path, tmp_path: Path) -> None:
    folder = damaged(
        int8,
        tmp_path / "bad",
        **{
            f"{UP}.weight": lambda value: value.index_fill(1, torch.tensor([2, 7]), 1).contiguous(),
            f"{DOWN}.SCB": lambda value: value * 1.5,
            "model.norm.weight": in_place((6,), 3.5),
            "model.layers.0.input_layernorm.weight": lambda value: value.float(),
            "lm_head.weight": None,
            "more": lambda _: torch.zeros(3),
        },
    )
    assert pyint8.verify(folder).is_sound
    result = pyint8.verify(folder, against=source, device="cpu")
    problems = {each.tensor: each for each in result.findings}
    assert problems.keys() == {
        f"{UP}.weight",
        f"{DOWN}.SCB",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
        "more",
    }
    stored, good = (load_file(each / "model.safetensors") for each in (folder, int8))
    count = int((stored[f"{UP}.weight"] != good[f"{UP}.weight"]).sum())
    assert problems[f"{UP}.weight"].problem.startswith(f"{count} of its {96 * 64} values")
    entries = open_checkpoint(folder)
    assert problems["model.norm.weight"].problem.startswith("1 of its 64 values")
    offset = problems["model.norm.weight"].offset
    assert offset is not None
    assert (offset - entries["model.norm.weight"].offset) // 2 == 6
    assert "gives BF16 [64]" in problems["model.layers.0.input_layernorm.weight"].problem
    assert "it is not there" in problems["lm_head.weight"].problem
    assert "gives no such tensor" in problems["more"].problem


def test_shards_that_cannot_be_opened_are_all_listed(sharded: Path, source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "bad"))
    first, second, third, fourth = shards(folder)[:4]
    first.unlink()
    os.truncate(second, second.stat().st_size - 1)
    third.write_bytes(b"\xff" * 100)
    damage = open_checkpoint(fourth)
    name = next(name for name in damage if name.endswith("SCB"))
    with open(fourth, "r+b") as file:
        file.seek(damage[name].offset)
        file.write(b"\xff\xff\xff\xff")
    for options in ({}, {"against": source, "device": "cpu"}):
        result = pyint8.verify(folder, **options)  # type: ignore[arg-type]
        paths = {each.path for each in result.findings if each.path is not None}
        assert {str(path) for path in (first, second, third)} <= paths
        assert (name, str(fourth)) in {(each.tensor, each.path) for each in result.findings}


def test_a_single_file_that_cannot_be_opened(int8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8, tmp_path / "bad"))
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    result = pyint8.verify(folder)
    assert [each.path for each in result.findings] == [str(file)]
    assert (result.tensors, result.is_sound) == (0, False)


def test_an_index_that_lies(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "bad"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["nowhere"] = shards(folder)[0].name
    index.write_text(json.dumps(content))
    assert [name for name, _ in found(folder)] == ["nowhere"]


def test_a_configuration_that_does_not_say_int8(int8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8, tmp_path / "bad"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (finding,) = pyint8.verify(folder).findings
    assert "does not say" in finding.problem
    assert finding.path == str(folder / "config.json")
    (folder / "config.json").write_text("{")
    assert "no JSON" in found(folder)[0][1]


@pytest.mark.parametrize("against", [False, True])
def test_what_cannot_be_read_is_listed_and_the_rest_is_read(
    against: bool, int8: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors lie where the disk fails; one that is read after them is bad."""
    folder = damaged(int8, tmp_path / "bad", **{f"{DOWN}.SCB": in_place((5,), float("inf"))})
    lost = [f"{UP}.weight", "model.layers.0.mlp.gate_proj.SCB"]
    land, path = TensorStream._land, str(folder / "model.safetensors")

    def failing(stream: TensorStream, chunk: Any) -> torch.Tensor:
        entry = chunk.request.entry
        if entry.path == path and entry.name in lost:
            raise ReadError("input/output error", path=path, tensor=entry.name, offset=entry.offset, errno=5)
        return land(stream, chunk)

    monkeypatch.setattr(TensorStream, "_land", failing)
    options: dict[str, Any] = {"against": source, "device": "cpu"} if against else {}
    result = pyint8.verify(folder, **options)
    assert sorted(each.tensor or "" for each in result.findings if "input/output" in each.problem) == sorted(lost)
    assert f"{DOWN}.SCB" in {each.tensor for each in result.findings}
    assert {each.tensor for each in result.findings} == {*lost, f"{DOWN}.SCB"}


def test_an_error_of_a_tensor_that_is_read_ahead(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's first error ends all reads; it may be of another tensor than the one that is waited for."""
    names = list(open_checkpoint(int8))
    land, failed = TensorStream._land, []

    def failing(stream: TensorStream, chunk: Any) -> torch.Tensor:
        if not failed and chunk.request.entry.name == names[3]:
            failed.append(names[5])
            entry = open_checkpoint(int8)[names[5]]
            raise ReadError("input/output error", path=entry.path, tensor=entry.name, offset=entry.offset, errno=5)
        return land(stream, chunk)

    monkeypatch.setattr(TensorStream, "_land", failing)
    read: list[str] = []
    take = verifying.StoredBytes.read
    monkeypatch.setattr(
        verifying.StoredBytes, "read", lambda self, name, to: bool(take(self, name, to) and not read.append(name))
    )
    assert [name for name, _ in found(int8)] == [names[5]]
    assert read == [name for name in names if name != names[5]]


def test_a_file_that_changes_meanwhile(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(int8, tmp_path / "copy"))
    check = verifying.Verifier.check

    def late(self: verifying.Verifier, name: str, expected: Any = None) -> None:
        check(self, name, expected)
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(verifying.Verifier, "check", late)
    assert "changed" in found(folder)[0][1] or "written" in found(folder)[0][1]


def test_bad_values_of_the_source_are_no_error(int8: Path, source: Path, tmp_path: Path) -> None:
    other = changed(source, tmp_path / "a", lambda tensors: tensors[f"{UP}.weight"][3, 4].fill_(float("nan")))
    assert {name for name, _ in found(int8, against=other, device="cpu")} <= {f"{UP}.weight", f"{UP}.SCB"}
