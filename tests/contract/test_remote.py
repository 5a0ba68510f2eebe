"""Checkpoints under URLs: the same models and files, every byte from the server, read once; nothing is left."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import compare_models, compare_outputs, remains, show
from plain_models import Net, assert_same, drawn, on_meta, saved
from range_server import Fault, RangeServer, serving
from reloads import memory
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import (
    NonFiniteWeightError,
    RemoteError,
)
from pyint8.operations.cached import wait_for_fills

pytest.importorskip("obstore")

pytestmark = pytest.mark.usefixtures("far_away")

CPU = {"": "cpu"}
STORED = [(model, "bf16") for model in ZOO.values()] + [(model, PREQUANTIZED) for model in ZOO.values()][:3]


def headers_of(folder: Path) -> int:
    """The bytes of all that is no tensor in the shards of a folder."""
    checkpoint = open_checkpoint(folder)
    return sum(os.stat(path).st_size for path in checkpoint.files) - checkpoint.nbytes


@pytest.mark.parametrize(("zoo_model", "stored"), STORED, ids=lambda value: getattr(value, "name", value))
def test_the_same_model(zoo_model: ZooModel, stored: str, checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(zoo_model, stored)
    torch.manual_seed(0)
    theirs = pyint8.load(folder, CPU, model=zoo_model.cls)
    with serving(folder) as served:
        torch.manual_seed(0)
        ours, report = pyint8.load(served.url, CPU, model=zoo_model.cls, return_report=True)
    assert served.asked() == report.checkpoint_bytes + headers_of(folder)
    found = compare_models(ours, theirs, allow=["*/name_or_path", "*/_name_or_path"])
    assert not found, show(found)
    assert not compare_outputs(ours, theirs, zoo_model.inputs(ours))
    assert remains(ours) == []
    assert ours.name_or_path == ours.config.name_or_path == served.url
    assert not [each for each in ours.modules() if "/pyint8-" in str(getattr(each, "name_or_path", ""))]


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, drawn(Net()))
    theirs = pyint8.load(folder, CPU, model=on_meta())
    with serving(folder) as served:
        for url in (served.url, f"{served.url}/model.safetensors"):
            assert_same(pyint8.load(url, CPU, model=on_meta()), theirs)


def test_what_is_read_once_more_for_an_error_comes_from_the_server(changeable: RangeServer) -> None:
    """Which value of a tensor float16 cannot hold is looked for in its bytes, when there is one."""
    from safetensors.torch import load_file, save_file

    path = changeable.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightError, match="row 3 has NaN") as caught:
        pyint8.load(changeable.url, CPU, dtype=torch.float16)
    assert caught.value.path == f"{changeable.url}/model.safetensors"
    assert caught.value.tensor == "model.norm.weight"


def test_converted(server: RangeServer, tmp_path: Path) -> None:
    pyint8.convert(server.folder, tmp_path / "theirs", device="cpu", max_shard_size="50KB")
    headers = headers_of(server.folder)
    report = pyint8.convert(server.url, tmp_path / "ours", device="cpu", max_shard_size="50KB")
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ours", "theirs")
    )
    assert ours == theirs
    assert server.asked() == report.checkpoint_bytes + headers
    assert not (tmp_path / "ours.saving-resumed").exists()


def test_a_conversion_goes_on_where_the_server_failed(server: RangeServer, tmp_path: Path) -> None:
    pyint8.convert(server.url, tmp_path / "whole", device="cpu")
    server.faults = [Fault(503, beyond=5000, name="00002-of-00005.safetensors"), Fault(503, beyond=5000)]
    with pytest.raises(RemoteError):
        pyint8.convert(server.url, tmp_path / "ours", device="cpu")
    assert [path.name for path in tmp_path.glob(".ours*")] == [".ours.saving-resumed"]
    server.faults = []
    pyint8.convert(server.url, tmp_path / "ours", device="cpu")
    ours, whole = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ours", "whole"))
    assert ours == whole
    assert not list(tmp_path.glob(".ours*"))


def test_inspected(server: RangeServer) -> None:
    ours, theirs = pyint8.inspect(server.url), pyint8.inspect(server.folder)
    found = {**ours.to_dict(), "path": "", "files": [], "tensors": [], "device_memory": {}}
    assert found == {**theirs.to_dict(), "path": "", "files": [], "tensors": [], "device_memory": {}}
    assert ours.path == server.url
    assert ours.files == tuple(f"{server.url}/{os.path.basename(file)}" for file in theirs.files)
    assert {tensor.file for tensor in ours.tensors} == set(ours.files)
    assert server.asked() == headers_of(server.folder)


def test_verified(server: RangeServer, int8: Path, changeable: RangeServer) -> None:
    assert pyint8.verify(server.url).is_sound
    with serving(int8) as served:
        assert pyint8.verify(served.url, against=changeable.url).is_sound
        assert pyint8.verify(int8, against=changeable.url).is_sound
    changeable.faults = [Fault(403, times=1, beyond=20_000)]
    found = pyint8.verify(changeable.url, options=pyint8.StreamOptions(threads=1))
    assert found.path == changeable.url
    assert {finding.path for finding in found.findings} == {f"{changeable.url}/model.safetensors"}
    assert all(finding.tensor is not None for finding in found.findings)
    assert not re.search("/pyint8-", str(found))


def test_reloaded(server: RangeServer, new: Path) -> None:
    model = pyint8.load(new, CPU)
    pyint8.reload(model, server.url)
    theirs = memory(pyint8.load(server.folder, CPU))
    for name, tensor in memory(model).items():
        assert torch.equal(tensor, theirs[name]), name


def test_cached(changeable: RangeServer, tmp_path: Path) -> None:
    def load() -> tuple[Any, bool, int]:
        before = changeable.asked()
        model, report = pyint8.load(changeable.url, CPU, cache=tmp_path / "cache", return_report=True)
        assert wait_for_fills(60)
        return model, report.from_cache, changeable.asked() - before

    headers = headers_of(changeable.folder)
    first, was_cached, _ = load()
    assert not was_cached
    second, was_cached, asked = load()
    assert was_cached
    assert asked == headers
    found = compare_models(second, first, allow=["*"])
    assert not found, show(found)
    assert second.name_or_path == changeable.url
    path = changeable.folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)  # of the same length: only the ETag is another
    assert not load()[1]
