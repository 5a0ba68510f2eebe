"""Hub ids that have to be downloaded, from a hub on this machine."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checksums import add_checksums
from forking import LOADING, ForkingPython
from hub_server import COMMIT, HubServer
from zoo import ZOO, CheckpointStore

from pyint8.checkpoint.checksums import CHECKSUMS

pytestmark = pytest.mark.slow

Load = Callable[..., tuple[dict[str, Any], str]]

REPO = "people/llama"
_LOAD = """
import json, sys
import pyint8
from pyint8.checkpoint import open_checkpoint
try:
    kwargs = json.loads(sys.argv[3])
    kwargs.setdefault("cache_dir", sys.argv[2])
    model, report = pyint8.load(sys.argv[1], "cpu", return_report=True, **kwargs)
    total = sum(float(value.float().sum()) for value in model.state_dict().values() if hasattr(value, "float"))
    print(json.dumps({"sum": total, "bytes": report.checkpoint_bytes}))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


@pytest.fixture(scope="module")
def folder(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama_sharded"], "bf16")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[HubServer]:
    with HubServer(REPO, folder).running() as running:
        yield running


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.sent.clear()
    server.cut.clear()
    server.token = None
    return server


@pytest.fixture(scope="module")
def python(server: HubServer) -> Iterator[ForkingPython]:
    """In an environment with that hub, which huggingface_hub looks at once."""
    environment = dict(os.environ) | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.pop(name, None)
    with ForkingPython(LOADING, environment) as forking:
        yield forking


@pytest.fixture
def load(python: ForkingPython, tmp_path: Path) -> Load:
    """What became of a load in a process of its own, and what it wrote to the terminal: load(path, **options)."""

    def load_one(path: object, **options: Any) -> tuple[dict[str, Any], str]:
        done = python.run("", [str(path), str(tmp_path), json.dumps(options)], Path("/"), before=_LOAD)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr

    return load_one


def test_everything_is_downloaded_once(hub: HubServer, folder: Path, tmp_path: Path, load: Load) -> None:
    found, shown = load(REPO)
    assert found["bytes"] > 0
    assert found == load(folder)[0]
    assert Counter(hub.sent) == Counter(path.name for path in folder.iterdir() if path.name in hub.sent)
    assert {path.name for path in folder.glob("*.safetensors")} <= set(hub.sent)
    assert "Fetching" in shown  # the hub's bar
    assert "Loading weights" not in shown
    hub.sent.clear()
    assert load(REPO)[0] == found
    assert hub.sent == []


def test_checksums_are_downloaded_and_compared(hub: HubServer, folder: Path, tmp_path: Path, load: Load) -> None:
    add_checksums(folder)
    noted = folder / CHECKSUMS
    try:
        assert "bytes" in load(REPO)[0]
        assert CHECKSUMS in hub.sent
        content = json.loads(noted.read_text())
        shard, tensor = next((name, next(iter(tensors))) for name, tensors in content["files"].items())
        content["files"][shard][tensor] = "00000000"
        noted.write_text(json.dumps(content))
        error = load(REPO, cache_dir=str(tmp_path / "other"))[0]["error"]
    finally:
        noted.unlink()
    assert error.startswith("ChecksumError")
    assert tensor in error


def test_what_is_missing_is_downloaded(hub: HubServer, folder: Path, tmp_path: Path, load: Load) -> None:
    found, _ = load(REPO)
    snapshot = next((tmp_path / "models--people--llama" / "snapshots").iterdir())
    lost = sorted(snapshot.glob("*.safetensors"))[1]
    lost.resolve().unlink()
    lost.unlink()
    hub.sent.clear()
    assert load(REPO)[0] == found
    assert hub.sent == [lost.name]


def test_a_download_that_breaks_off_can_be_repeated(hub: HubServer, folder: Path, tmp_path: Path, load: Load) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1].name
    hub.cut.add(shard)
    assert shard in load(REPO)[0]["error"] or hub.sent.count(shard) > 0
    hub.cut.clear()
    found, _ = load(REPO)
    assert found["bytes"] > 0
    assert found == load(folder)[0]


def test_a_repository_that_asks_for_a_token(hub: HubServer, folder: Path, tmp_path: Path, load: Load) -> None:
    hub.token = "hf_secret"
    refused = load(REPO)[0]["error"]
    assert "CheckpointNotFoundError" in refused
    assert "token" in refused
    found, _ = load(REPO, token=hub.token)
    assert found["bytes"] > 0
    assert found == load(folder)[0]


def test_a_commit_and_a_subfolder(hub: HubServer, folder: Path, tmp_path: Path, load: Load) -> None:
    found, _ = load(REPO, revision=COMMIT)
    assert found["bytes"] > 0
    assert [path.name for path in (tmp_path / "models--people--llama" / "snapshots").iterdir()] == [COMMIT]
    error = load(REPO, subfolder="nowhere")[0]["error"]
    assert "CheckpointNotFoundError" in error
    assert "no config.json in its folder nowhere" in error
