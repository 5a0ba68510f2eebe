"""A real S3 interface: moto's server, with credentials from the environment and from storage_options."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import compare_models, show
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.checkpoint.checksums import CHECKSUMS
from pyint8.errors import CheckpointNotFoundError, FileChangedError, RemoteError
from pyint8.remote.folder import opened
from pyint8.remote.store import Store

pytest.importorskip("obstore")
server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

pytestmark = pytest.mark.filterwarnings("default")  # of botocore's and flask's own
BUCKET = "models"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an empty bucket; the environment names the endpoint, and has credentials."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=BUCKET)
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    return client


@pytest.fixture
def folder(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama_sharded"], "bf16")


@pytest.fixture
def url(s3: Any, folder: Path) -> str:
    for path in folder.iterdir():
        s3.upload_file(str(path), BUCKET, f"llms/tiny llama/{path.name}".replace(" ", "-"))
    s3.put_object(Bucket=BUCKET, Key="llms/tiny-llama/original/consolidated.pth", Body=b"of another format")
    s3.put_object(Bucket=BUCKET, Key="llms/tiny-llama/.hidden", Body=b"not fetched")
    s3.put_object(Bucket=BUCKET, Key="llms/tiny-llama-chat/config.json", Body=b"of another model")
    return f"s3://{BUCKET}/llms/tiny-llama"


def test_the_same_model(url: str, folder: Path, tmp_path: Path) -> None:
    theirs = pyint8.load(folder, {"": "cpu"})
    for given in (url, f"{url}/"):
        ours = pyint8.load(given, {"": "cpu"})
        found = compare_models(ours, theirs, allow=["*/name_or_path", "*/_name_or_path"])
        assert not found, show(found)
        assert ours.name_or_path == given
    pyint8.convert(url, tmp_path / "ours", device="cpu")
    pyint8.convert(folder, tmp_path / "theirs", device="cpu")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


def test_what_is_listed(url: str, folder: Path) -> None:
    with opened(url) as here:
        assert sorted(path.name for path in Path(here).iterdir()) == sorted(path.name for path in folder.iterdir())
        assert dict(open_checkpoint(here)).keys() == dict(open_checkpoint(folder)).keys()


def test_checksums_of_one_file(s3: Any, url: str, folder: Path) -> None:
    shard = min(path.name for path in folder.glob("*.safetensors"))
    content = {"algorithm": "crc32c", "files": {shard: dict.fromkeys(open_checkpoint(folder / shard), "0000000a")}}
    s3.put_object(Bucket=BUCKET, Key=f"llms/tiny-llama/{CHECKSUMS}", Body=json.dumps(content).encode())
    with opened(f"{url}/{shard}") as here:
        assert {entry.crc32c for entry in open_checkpoint(here).values()} == {10}


def test_storage_options(url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(name)
    options = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "access_key_id": "id",
        "secret_access_key": "secret",
        "client_options": {"allow_http": True},
    }
    assert pyint8.inspect(url, storage_options=options).files


def test_an_object_that_changes(s3: Any, url: str, impatient: dict[str, Any]) -> None:
    store = Store(url, None, threading.Event())
    known = store.described("config.json")
    assert known is not None
    s3.put_object(Bucket=BUCKET, Key="llms/tiny-llama/config.json", Body=bytes(known.size))
    with pytest.raises(FileChangedError) as caught:
        store.read(known, 1, 10)
    assert str(caught.value).startswith(f"{url}/config.json, byte 1: the object changed")


@pytest.mark.parametrize("given", ["s3://models/elsewhere", "s3://no-such-bucket/a"])
def test_nothing_there(s3: Any, given: str) -> None:
    with pytest.raises((CheckpointNotFoundError, RemoteError)) as caught:
        pyint8.load(given)
    assert caught.value.path == given
    assert re.search("nothing lies there|not there", str(caught.value))


def test_only_pickles(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="old/pytorch_model.bin", Body=b"x")
    s3.put_object(Bucket=BUCKET, Key="old/config.json", Body=b"{}")
    with pytest.raises(CheckpointNotFoundError, match=r"pytorch_model.bin, of PyTorch's format"):
        pyint8.load("s3://models/old")


def test_from_several_threads(url: str, folder: Path) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(pyint8.load(url, {"": "cpu"}))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    theirs = pyint8.load(folder, {"": "cpu"})
    assert len(found) == 3
    for ours in found:
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
