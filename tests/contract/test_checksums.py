"""Checksums: a save writes those of the bytes it wrote, and no way of reading takes bytes that have others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checksums import add_checksums, damage, expected, noted
from oracle import compare_models, show
from plain_models import Net
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.checkpoint.checksums import CHECKSUMS
from pyint8.errors import CheckpointError, ChecksumError, PartlyReplacedError, Pyint8Error

CPU = {"": "cpu"}


@pytest.fixture
def folder(copy_of: Callable[..., Path]) -> Path:
    found = copy_of("llama_sharded", "bf16")
    add_checksums(found)
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_those_of_save_and_convert(name: str, size: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = checkpoints.folder(ZOO[name], "bf16")
    pyint8.convert(source, tmp_path / "converted", device="cpu", max_shard_size=size, checksums=True)
    pyint8.save(pyint8.load(source, CPU), tmp_path / "saved", max_shard_size=size, checksums=True)
    for folder in (tmp_path / "converted", tmp_path / "saved"):
        assert noted(folder) == expected(open_checkpoint(folder))
    assert (tmp_path / "converted" / CHECKSUMS).read_bytes() == (tmp_path / "saved" / CHECKSUMS).read_bytes()
    assert pyint8.verify(tmp_path / "saved").is_sound


def test_those_of_a_plain_module(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "w.bin")
    module = pyint8.load(tmp_path / "w.bin", CPU, model=Net())
    pyint8.save(module, tmp_path / "int8", checksums=True)
    assert noted(tmp_path / "int8") == expected(open_checkpoint(tmp_path / "int8"))
    again = pyint8.load(tmp_path / "int8", CPU, model=Net())
    values = module.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in again.state_dict().items())


def test_a_conversion_that_is_continued(
    checkpoints: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyint8.models import converted_files
    from pyint8.streaming.write_behind import WriteBehind

    put, count = WriteBehind.put, []

    def interrupted(*args: Any) -> Any:
        count.append(args)
        if len(count) == 30:
            raise KeyboardInterrupt
        future = put(*args)
        future.result()
        return future

    source = checkpoints.folder(ZOO["llama_sharded"], "bf16")
    monkeypatch.setattr(converted_files, "_NOTED_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(WriteBehind, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pyint8.convert(source, tmp_path / "int8", device="cpu", checksums=True)
    with monkeypatch.context() as patch:
        patch.setattr(WriteBehind, "put", lambda *args: count.append(args) or put(*args))
        pyint8.convert(source, tmp_path / "int8", device="cpu", checksums=True)
    assert len(count) < 30 + 40  # of 49
    assert noted(tmp_path / "int8") == expected(open_checkpoint(tmp_path / "int8"))


def test_a_save_without_them_leaves_none(folder: Path, tmp_path: Path) -> None:
    """Neither those of the source nor those of what was there before are those of what is saved."""
    model = pyint8.load(folder, CPU)
    pyint8.save(model, tmp_path / "int8", checksums=True)
    assert (tmp_path / "int8" / CHECKSUMS).exists()
    pyint8.save(model, tmp_path / "int8")
    assert not (tmp_path / "int8" / CHECKSUMS).exists()
    pyint8.convert(folder, tmp_path / "other", device="cpu")
    assert not (tmp_path / "other" / CHECKSUMS).exists()


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16", "fp32", PREQUANTIZED])
@pytest.mark.parametrize("zoo_model", ZOO.values(), ids=list(ZOO))
def test_what_is_sound_loads(zoo_model: ZooModel, kind: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    """Each byte of each tensor is counted once, however a model's tensors are read, and one that is bad is found."""
    folder = Path(shutil.copytree(checkpoints.folder(zoo_model, kind), tmp_path / "checked"))
    load: dict[str, Any] = {"device_map": CPU, "model": zoo_model.cls}
    torch.manual_seed(0)  # of a head that is drawn
    unchecked = pyint8.load(folder, **load)
    checkpoint = add_checksums(folder)
    torch.manual_seed(0)
    found = compare_models(pyint8.load(folder, **load), unchecked)
    assert not found, show(found)
    entry = max(checkpoint.values(), key=lambda entry: entry.nbytes)
    damage(entry, entry.nbytes // 2)
    with pytest.raises(ChecksumError) as caught:
        pyint8.load(folder, **load)
    assert (caught.value.tensor, caught.value.path, caught.value.offset) == (entry.name, entry.path, entry.offset)


def reading(way: str, folder: Path, model: Any) -> None:
    if way == "load":
        pyint8.load(folder, CPU)
    elif way == "convert":
        pyint8.convert(folder, folder.parent / "converted", device="cpu")
    else:
        pyint8.reload(model, folder)


@pytest.mark.parametrize("way", ["load", "convert", "reload"])
@pytest.mark.parametrize(
    "tensor",
    ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"],
)
def test_damage_is_found(tensor: str, way: str, folder: Path) -> None:
    model = pyint8.load(folder, CPU)
    entry = open_checkpoint(folder)[tensor]
    damage(entry, 0)
    with pytest.raises(Pyint8Error) as caught:
        reading(way, folder, model)
    error = caught.value.__cause__ if isinstance(caught.value, PartlyReplacedError) else caught.value
    assert isinstance(error, ChecksumError)
    assert (error.tensor, error.path, error.offset) == (tensor, entry.path, entry.offset)
    assert "copy or download the file again" in str(error)


def test_verify_lists_what_is_damaged(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    names = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"]
    for name in names:
        damage(checkpoint[name], 5)
    findings = pyint8.verify(folder).findings
    assert sorted(str(finding.tensor) for finding in findings) == names
    assert all("CRC-32C" in finding.problem for finding in findings)


def test_they_can_be_left_alone(folder: Path) -> None:
    damage(open_checkpoint(folder)["model.embed_tokens.weight"], 0)
    pyint8.load(folder, CPU, options=pyint8.StreamOptions(checksums=False))
    (folder / CHECKSUMS).unlink()
    pyint8.load(folder, CPU)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"algorithm": "md5", "files": {}}',
        '{"algorithm": "crc32c", "files": []}',
        '{"algorithm": "crc32c", "files": {"a": {"b": 3}}}',
        '{"algorithm": "crc32c", "files": {"a": {"b": "xyz"}}}',
        '{"algorithm": "crc32c", "files": {"a": {"b": "123456789"}}}',
        '{"algorithm": "crc32c", "files": {"a": {"b": "-1"}}}',
        '{"algorithm": "crc32c", "files": {"a": [["b", "0"]]}}',
        "[" * 100_000,
        "\udcff",
    ],
    ids=lambda text: text[:60],
)
def test_a_file_that_has_none(content: str, folder: Path) -> None:
    (folder / CHECKSUMS).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="remove the file to load without them") as caught:
        pyint8.load(folder, CPU)
    assert caught.value.path == str(folder / CHECKSUMS)


def test_of_some_tensors_alone(folder: Path) -> None:
    """What is not named is not checked: a shard that was added, a tensor that is no more."""
    file = folder / CHECKSUMS
    content = json.loads(file.read_text())
    for checksums in content["files"].values():
        checksums.pop("model.embed_tokens.weight", None)
        checksums["gone"] = "00000000"
    file.write_text(json.dumps(content))
    damage(open_checkpoint(folder)["model.embed_tokens.weight"], 0)
    pyint8.load(folder, CPU)
