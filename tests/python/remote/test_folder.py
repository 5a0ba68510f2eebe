"""The folder that stands for a remote one: what is in it, what is refused, and that it goes in any case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checksums import add_checksums, damage
from range_server import Fault, RangeServer
from safetensors import safe_open
from safetensors.torch import save_file

import pyint8
from pyint8.checkpoint import open_checkpoint, read_header
from pyint8.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    FileChangedError,
    HeaderError,
    OptionError,
    RemoteError,
    TruncatedError,
    WriteError,
)
from pyint8.remote import folder as module
from pyint8.remote.folder import opened
from pyint8.remote.objects import remote_object, tag_of, url_of


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the folders are, and of which nothing may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    folder.chmod(0o700)
    assert not list(folder.iterdir())
    assert not module.objects._objects
    assert not module.objects._folders


def test_it_looks_like_the_real_one(server: RangeServer, folder: Path) -> None:
    with opened(server.url) as here:
        assert os.path.basename(here) == "tiny"
        assert sorted(os.listdir(here)) == ["config.json", "model.safetensors"]
        ours, theirs = open_checkpoint(here), open_checkpoint(folder)
        path = os.path.join(here, "model.safetensors")
        assert os.stat(path).st_size == (folder / "model.safetensors").stat().st_size
        assert {name: entry.offset for name, entry in ours.items()} == {n: e.offset for n, e in theirs.items()}
        with safe_open(path, "pt") as file:  # as transformers does
            assert file.metadata() == {"format": "pt"}
        found = remote_object(path)
        assert found is not None
        assert found.url == f"{server.url}/model.safetensors"
        assert url_of(f"in {path}") == f"in {server.url}/model.safetensors"
        assert str(server.tag((folder / "model.safetensors").read_bytes())) in str(tag_of(path))
        link = Path(here).parent / "link"
        link.symlink_to(here)
        assert remote_object(str(link / "model.safetensors")) is found  # however the path is written
    assert remote_object(path) is None
    assert not os.path.exists(here)


def test_a_shard_takes_no_room(server: RangeServer, folder: Path) -> None:
    save_file({"large": torch.zeros(8 << 20)}, folder / "model.safetensors")
    with opened(server.url) as here:
        status = os.stat(os.path.join(here, "model.safetensors"))
    assert status.st_size > 32 << 20
    assert status.st_blocks * 512 <= 1 << 20
    assert server.asked() == module._FIRST_BYTES


def test_a_long_header(server: RangeServer, folder: Path) -> None:
    save_file(
        {f"a_rather_long_name_of_a_tensor.{i}": torch.zeros(1) for i in range(6000)}, folder / "model.safetensors"
    )
    size = read_header(folder / "model.safetensors").entries["a_rather_long_name_of_a_tensor.0"].offset
    assert size > module._FIRST_BYTES
    with opened(server.url) as here:
        assert len(open_checkpoint(here)) == 6000


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_that_an_index_names(server: RangeServer, folder: Path, variant: str | None) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(3)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    (folder / "stray.safetensors").write_bytes(b"not asked for")
    index = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    (folder / index).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with opened(server.url, variant=variant) as here:
        assert sorted(open_checkpoint(here, variant=variant)) == ["a", "b"]
    assert server.asked("stray.safetensors") == 0


def test_a_shard_that_is_missing(server: RangeServer, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(3)}, folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointNotFoundError, match="this shard is missing") as caught, opened(server.url) as here:
        open_checkpoint(here)
    assert caught.value.path == f"{server.url}/two.safetensors"
    assert f"{server.url}/model.safetensors.index.json says" in str(caught.value)


@pytest.mark.parametrize("shard", ["../../evil.safetensors", "/tmp/evil.safetensors", "..", "a/b.safetensors"])
def test_an_index_that_leaves_its_folder(server: RangeServer, folder: Path, shard: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="not the plain name of a file") as caught, opened(server.url):
        pass
    assert caught.value.path == f"{server.url}/model.safetensors.index.json"


def test_one_file(server: RangeServer, folder: Path) -> None:
    with opened(f"{server.url}/model.safetensors") as here:
        assert os.listdir(os.path.dirname(here)) == ["model.safetensors"]
        assert sorted(open_checkpoint(here)) == ["a", "b", "c", "empty"]


@pytest.mark.parametrize("name", ["", "/model.safetensors"])
@pytest.mark.parametrize("absent", [404, 403])
def test_checksums_are_compared(server: RangeServer, folder: Path, name: str, absent: int) -> None:
    server.absent = absent
    assert pyint8.verify(f"{server.url}{name}").is_sound  # there are none
    damage(add_checksums(folder)["a"], 5)
    found = pyint8.verify(f"{server.url}{name}").findings
    assert [(each.tensor, each.path) for each in found] == [("a", f"{server.url}/model.safetensors")]


def test_a_folder_inside(server: RangeServer, folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(inside / name)
    with opened(server.url, subfolder="inside") as here:
        assert len(open_checkpoint(here, subfolder="inside")) == 4
        path = os.path.join(here, "inside", "model.safetensors")
        assert url_of(path) == f"{server.url}/inside/model.safetensors"
    with pytest.raises(OptionError, match="must lie inside"), opened(server.url, subfolder="../other"):
        pass


def test_a_file_that_the_configuration_names(server: RangeServer, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    with opened(server.url) as here:
        assert len(open_checkpoint(os.path.join(here, "other.safetensors"))) == 4


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        ([], CheckpointNotFoundError, "nothing lies there"),
        (["pytorch_model.bin", "config.json"], CheckpointNotFoundError, "pytorch_model.bin, of PyTorch's format"),
        (["pytorch_model.bin.index.json", "config.json"], CheckpointNotFoundError, "of PyTorch's format"),
        (["adapter_config.json", "adapter_model.safetensors"], OptionError, "holds a PEFT adapter"),
    ],
)
def test_what_cannot_be_read_from_there(
    server: RangeServer, folder: Path, names: list[str], kind: type, said: str
) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        (folder / name).write_text("{}")
    with pytest.raises(kind, match=said), opened(server.url):
        pass


def test_limits(server: RangeServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").write_bytes(bytes(1000))
    monkeypatch.setattr(module, "_LARGEST_BYTES", 999)
    with pytest.raises(CheckpointError, match="1000 bytes, more than the 999") as caught, opened(server.url):
        pass
    assert caught.value.path == f"{server.url}/tokenizer.json"
    assert server.asked("tokenizer.json") == 0
    monkeypatch.setattr(module, "_LARGEST_BYTES", 1000)
    monkeypatch.setattr(module, "_MOST_BYTES", 1010)
    with pytest.raises(CheckpointError, match="more than 1010"), opened(server.url):
        pass


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", TruncatedError),
        (b"1234567", TruncatedError),
        (b"\xff" * 8, HeaderError),
        ((1 << 40).to_bytes(8, "little") + b"{", HeaderError),
        ((99_000_000).to_bytes(8, "little") + b"{}", TruncatedError),
        (b"version https://git-lfs.github.com/spec/v1", HeaderError),
    ],
)
def test_headers_that_are_none(server: RangeServer, folder: Path, raw: bytes, kind: type) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(kind) as caught, opened(server.url) as here:
        open_checkpoint(here)
    assert caught.value.path == f"{server.url}/model.safetensors"


def test_a_header_that_changes_while_it_is_read(server: RangeServer) -> None:
    server.faults = [Fault("changed", beyond=0)]
    with pytest.raises(FileChangedError), opened(server.url):
        pass


def test_servers_that_refuse_what_is_not_there(server: RangeServer, folder: Path) -> None:
    server.absent = 403
    with opened(server.url) as here:
        assert len(open_checkpoint(here)) == 4
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(RemoteError, match="may not be read"), opened(server.url):
        pass


def test_an_error_inside_is_of_the_url(server: RangeServer) -> None:
    with pytest.raises(HeaderError) as caught, opened(server.url) as here:
        raise HeaderError(f"as {here}/config.json says", path=os.path.join(here, "model.safetensors"), offset=3)
    assert str(caught.value) == (f"{server.url}/model.safetensors, byte 3: as {server.url}/config.json says")


def test_no_room_for_it(server: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(WriteError, match="cannot be written"), opened(server.url):
        pass


@pytest.mark.parametrize("kind", ["stall", 503])
def test_ctrl_c_while_it_is_made(server: RangeServer, kind: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.remote.store._FIRST_PAUSE_SECONDS", 5)
    server.faults = [Fault(kind, beyond=0)]
    options = {"client_options": {"read_timeout": "1s"}}
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), opened(server.url, options):
        pass
    assert time.monotonic() - start < 3
    timer.join()


ENDS = """
import sys, tempfile, threading, time
tempfile.tempdir = sys.argv[2]
from pyint8.remote.folder import opened
inside = threading.Event()

def hold():
    with opened(sys.argv[1]) as here:
        inside.set()
        time.sleep(30)

threading.Thread(target=hold, daemon=True).start()
assert inside.wait(20)
"""


def test_it_goes_when_python_ends(server: RangeServer, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = ENDS.replace("time.sleep(30)", "time.sleep(1)")
    ended = subprocess.run([sys.executable, "-c", program, server.url, str(temporary)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not list(temporary.iterdir())


def test_a_child_that_was_forked_leaves_it(server: RangeServer) -> None:
    with opened(server.url) as here:
        stub = next(iter(module._stubs))
        stub._process += 1
        stub.remove()
        assert os.path.exists(here)
        stub._process -= 1


def test_options_reach_obstore(server: RangeServer, impatient: dict[str, Any]) -> None:
    server.faults = [Fault("stall", times=1, beyond=0)]
    start = time.monotonic()
    with opened(server.url, impatient):
        assert time.monotonic() - start < 4
