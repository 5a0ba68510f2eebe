"""Hub ids, answered from a local cache: no network is needed, and none is asked."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import compare_models, show
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint.find import find_checkpoint
from pyint8.errors import CheckpointNotFoundError, Pyint8Error
from pyint8.streaming import preparation

REPO = "people/llama"
REVISIONS = {"main": "1" * 40, "older": "2" * 40}


@pytest.fixture
def cache(checkpoints: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as huggingface_hub lays it out: snapshots of links to blobs; "older" is another model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--people--llama"
    for revision, name in (("main", "llama_sharded"), ("older", "llama")):
        snapshot = root / "snapshots" / REVISIONS[revision]
        for source in checkpoints.folder(ZOO[name], "bf16").iterdir():
            blob = root / "blobs" / hashlib.sha256(f"{name}/{source.name}".encode()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, blob)
            for at in (snapshot, snapshot / "deeper"):
                at.mkdir(parents=True, exist_ok=True)
                (at / source.name).symlink_to(blob)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(REVISIONS[revision])
    return tmp_path / "hub"


@pytest.mark.parametrize(("revision", "name"), [("main", "llama_sharded"), ("older", "llama")])
def test_an_id_is_inspected_in_the_cache(revision: str, name: str, cache: Path, checkpoints: CheckpointStore) -> None:
    found = pyint8.inspect(REPO, cache_dir=str(cache), revision=revision)
    expected = pyint8.inspect(checkpoints.folder(ZOO[name], "bf16"))
    assert (found.int8_files, found.device_bytes) == (expected.int8_files, expected.device_bytes)
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in expected.tensors]
    (cache / "models--people--llama" / "refs" / revision).unlink()
    with pytest.raises(CheckpointNotFoundError, match="hf download people/llama"):
        pyint8.inspect(REPO, cache_dir=str(cache), revision=revision)


@pytest.mark.parametrize(
    ("where", "name"),
    [({}, "llama_sharded"), ({"revision": "older"}, "llama"), ({"subfolder": "deeper"}, "llama_sharded")],
    ids=["main", "revision", "subfolder"],
)
def test_an_id_is_found_in_the_cache(
    where: dict[str, Any], name: str, cache: Path, checkpoints: CheckpointStore
) -> None:
    kwargs: dict[str, Any] = {"dtype": torch.float16}
    model, report = pyint8.load(
        REPO, "cpu", cache_dir=str(cache), local_files_only=True, return_report=True, **where, **kwargs
    )
    expected = pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", **kwargs)
    found = compare_models(model, expected, allow=["*name_or_path*", "*_commit_hash*", "*/subfolder*"])
    assert not found, show(found)
    assert report.engine["bytes_delivered"] == report.checkpoint_bytes > 0
    assert report.seconds["read headers"] > 0


def test_the_cache_is_begun_with(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are known, and read ahead, before transformers is asked."""
    seen: list[Any] = []
    prefetch = preparation.PageCachePrefetch

    def note(checkpoint: Any, options: Any) -> Any:
        seen.append(checkpoint)
        return prefetch(checkpoint, options)

    monkeypatch.setattr(preparation, "PageCachePrefetch", note)
    pyint8.load(REPO, "cpu", cache_dir=str(cache), local_files_only=True)
    assert len(seen[0].files) > 1


def test_what_will_be_downloaded_again_is_not_begun_with(cache: Path) -> None:
    assert find_checkpoint(REPO, {"cache_dir": str(cache)}) is not None
    assert find_checkpoint(REPO, {"cache_dir": str(cache), "force_download": True}) is None


def test_what_the_cache_lacks_is_said(cache: Path) -> None:
    with pytest.raises((Pyint8Error, OSError), match="people/absent"):
        pyint8.load("people/absent", "cpu", cache_dir=str(cache), local_files_only=True)
    snapshot = cache / "models--people--llama" / "snapshots" / REVISIONS["main"]
    shard = next(snapshot.glob("model-00002*.safetensors"))
    shard.unlink()
    with pytest.raises((Pyint8Error, OSError), match=shard.name):
        pyint8.load(REPO, "cpu", cache_dir=str(cache), local_files_only=True)


def test_a_snapshot_is_a_folder_of_links(cache: Path, checkpoints: CheckpointStore) -> None:
    snapshot = cache / "models--people--llama" / "snapshots" / REVISIONS["main"]
    expected = pyint8.load(checkpoints.folder(ZOO["llama_sharded"], "bf16"), "cpu")
    found = compare_models(pyint8.load(snapshot, "cpu"), expected, allow=["*name_or_path*"])
    assert not found, show(found)


def test_strange_names_and_read_only_folders(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = checkpoints.folder(ZOO["llama_sharded"], "bf16")
    folder = tmp_path / "ein Modell - 模型 'x' %20"
    shutil.copytree(source, folder)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        found = compare_models(pyint8.load(folder, "cpu"), pyint8.load(source, "cpu"), allow=["*name_or_path*"])
        assert not found, show(found)
    finally:
        folder.chmod(0o755)
