"""Checkpoints under URLs: the same models and files, every byte from the server, read once; nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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
    CheckpointNotFoundError,
    FileChangedError,
    NonFiniteWeightError,
    OptionError,
    PlacementError,
    RemoteError,
)
from pyint8.operations.cached import wait_for_fills

pytest.importorskip("obstore")

CPU = {"": "cpu"}
IMPATIENT = {"client_options": {"read_timeout": "300ms", "timeout": "1s"}}
STORED = [(model, "bf16") for model in ZOO.values()] + [(model, PREQUANTIZED) for model in ZOO.values()][:3]


@pytest.fixture(autouse=True)
def holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that is not the server's own is 0xFF, which is NaN in all dtypes of weights."""

    def extend(path: str, size: int) -> None:
        with open(path, "ab") as file:
            file.write(b"\xff" * (size - file.tell()))

    monkeypatch.setattr("pyint8.remote.folder._extend", extend)
    monkeypatch.setattr("pyint8.remote.store._FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("pyint8.remote.folder._FIRST_BYTES", 8)  # of tensors no byte, even of small ones


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.glob("pyint8-*"))


@pytest.fixture
def llama(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama_sharded"], "bf16")


@pytest.fixture
def server(llama: Path) -> Iterator[RangeServer]:
    with serving(llama) as served:
        yield served


@pytest.fixture
def changeable(copy_of: Callable[..., Path]) -> Iterator[RangeServer]:
    """A server of files that the test may change."""
    with serving(copy_of("llama", "bf16")) as served:
        yield served


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


def test_converted(server: RangeServer, llama: Path, tmp_path: Path) -> None:
    pyint8.convert(llama, tmp_path / "theirs", device="cpu", max_shard_size="50KB")
    headers = headers_of(llama)
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


def test_inspected(server: RangeServer, llama: Path) -> None:
    ours, theirs = pyint8.inspect(server.url), pyint8.inspect(llama)
    found = {**ours.to_dict(), "path": "", "files": [], "tensors": [], "device_memory": {}}
    assert found == {**theirs.to_dict(), "path": "", "files": [], "tensors": [], "device_memory": {}}
    assert ours.path == server.url
    assert ours.files == tuple(f"{server.url}/{os.path.basename(file)}" for file in theirs.files)
    assert {tensor.file for tensor in ours.tensors} == set(ours.files)
    assert server.asked() == headers_of(llama)


def test_verified(server: RangeServer, llama: Path, int8: Path, changeable: RangeServer) -> None:
    assert pyint8.verify(server.url).is_sound
    with serving(int8) as served:
        assert pyint8.verify(served.url, against=changeable.url).is_sound
        assert pyint8.verify(int8, against=changeable.url).is_sound
    changeable.faults = [Fault(403, times=1, beyond=20_000)]
    found = pyint8.verify(changeable.url, options=pyint8.StreamOptions(threads=1))
    assert found.path == changeable.url
    assert {finding.path for finding in found.findings} == {f"{changeable.url}/model.safetensors"}
    assert not re.search("/pyint8-", str(found))


def test_reloaded(server: RangeServer, llama: Path, new: Path) -> None:
    model = pyint8.load(new, CPU)
    pyint8.reload(model, server.url)
    theirs = memory(pyint8.load(llama, CPU))
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


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", [500, 429, "cut", "reset", "stall", "trickle"])
def test_faults_that_pass(changeable: RangeServer, kind: int | str) -> None:
    changeable.faults = [Fault(kind, times=3)]
    theirs = pyint8.load(changeable.folder, CPU)
    ours = pyint8.load(changeable.url, CPU, storage_options=IMPATIENT)
    found = compare_models(ours, theirs, allow=["*/name_or_path", "*/_name_or_path"])
    assert not found, show(found)
    assert changeable.faults[0].times == 0


@pytest.mark.parametrize(
    ("kind", "kind_of_error"),
    [
        (403, RemoteError),
        (404, RemoteError),
        (416, FileChangedError),
        (500, RemoteError),
        ("reset", RemoteError),
        ("stall", RemoteError),
        ("whole", RemoteError),
        ("changed", FileChangedError),
    ],
)
def test_faults_that_stay(changeable: RangeServer, kind: int | str, kind_of_error: type, nothing_left: None) -> None:
    pyint8.inspect(changeable.url, config=None)
    changeable.faults = [Fault(kind, beyond=20_000)]
    with pytest.raises(kind_of_error) as caught:
        pyint8.load(changeable.url, CPU, storage_options=IMPATIENT)
    assert caught.value.path == f"{changeable.url}/model.safetensors"
    assert caught.value.offset >= 20_000


@pytest.fixture(autouse=True)
def _threads_of_obstore(server: RangeServer) -> None:
    """They stay, as torch's do: let them be there before a test counts what is left."""
    from pyint8.remote.folder import opened

    with opened(server.url):
        server.requests.clear()


@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c(changeable: RangeServer) -> None:
    pyint8.load(changeable.folder, CPU)  # imports take long
    changeable.faults = [Fault("stall", beyond=20_000)]
    options = {"client_options": {"read_timeout": "1s"}}
    interrupted: list[float] = []

    def interrupt() -> None:
        while not any(request.start >= 20_000 for request in changeable.requests):
            time.sleep(0.01)
        time.sleep(0.2)
        interrupted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        pyint8.load(changeable.url, CPU, storage_options=options)
    assert time.monotonic() - interrupted[0] < 1.5
    thread.join()


def test_what_is_for_files_is_refused(server: RangeServer, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="direct_io is for files"):
        pyint8.load(server.url, options=pyint8.StreamOptions(direct_io=True))
    with pytest.raises(OptionError, match="use_safetensors=False"):
        pyint8.load(server.url, use_safetensors=False)
    with pytest.raises(OptionError, match="folder is s3://bucket/a, which is no folder here"):
        pyint8.convert(server.url, "s3://bucket/a")
    with pytest.raises(OptionError, match="folder is s3://bucket/a"):
        pyint8.save(torch.nn.Linear(1, 1), "s3://bucket/a")
    with pytest.raises(OptionError, match="offload_folder is s3://bucket/a"):
        pyint8.load(server.url, CPU, offload_folder="s3://bucket/a")
    with pytest.raises(OptionError, match="cache is s3://bucket/a"):
        pyint8.load(server.url, CPU, cache="s3://bucket/a")
    assert not Path("s3:").exists()


def test_what_stays_on_the_disk_is_refused(server: RangeServer, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "cpu" for layer in range(8)}
    config = pyint8.Int8Config(fp32_cpu_offload=True)
    with pytest.raises(PlacementError, match=r'the device map puts model.norm.weight on "disk".*is remote'):
        pyint8.load(server.url, device_map, config=config, offload_folder=tmp_path / "offload")
    parts = {"": "cpu", "norm": "disk"}
    with serving(saved(tmp_path, drawn(Net()))) as served, pytest.raises(PlacementError, match='on "disk"'):
        pyint8.load(served.url, parts, model=on_meta(), config=config, offload_folder=tmp_path / "offload")


def test_storage_options(server: RangeServer, llama: Path) -> None:
    with pytest.raises(OptionError, match="storage_options are for URLs"):
        pyint8.load(llama, storage_options={"region": "x"})
    with pytest.raises(OptionError, match="storage_options must be a dict"):
        pyint8.load(server.url, storage_options=[("region", "x")])
    with pytest.raises(OptionError, match="cannot be opened with these storage_options"):
        pyint8.inspect(server.url, storage_options={"region": "x"})


def test_nothing_there(server: RangeServer) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        pyint8.load(f"{server.url}/elsewhere")
    assert caught.value.path == f"{server.url}/elsewhere"


def test_an_adapter_whose_base_is_remote(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "s3://bucket/a", "peft_type": "LORA"}')
    with pytest.raises(CheckpointNotFoundError, match=r"The adapter .* names it"):
        pyint8.load(tmp_path)


ENDS = """
import sys, tempfile, threading, time
tempfile.tempdir = sys.argv[2]
import pyint8, transformers
from pyint8.remote import folder
options = {"client_options": {"read_timeout": "1s"}}
load = lambda: pyint8.load(sys.argv[1], "cpu", storage_options=options)
threading.Thread(target=load, daemon=True).start()
while not list(folder._stubs) or not folder.objects._objects:
    time.sleep(0.01)
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize("seconds", ["0", "3"])
@pytest.mark.parametrize("kind", ["stall", "trickle"])
def test_python_ends_while_a_daemon_thread_loads(
    changeable: RangeServer, tmp_path: Path, kind: str, seconds: str
) -> None:
    changeable.faults = [Fault(kind, beyond=20_000)]
    temporary = tmp_path / "temporary"
    command = [sys.executable, "-c", ENDS, changeable.url, str(temporary), seconds]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "Fatal" not in ended.stderr
    assert not list(temporary.iterdir())


def test_a_child_that_was_forked(server: RangeServer) -> None:
    """obstore's threads are not there: what would wait for them for ever is refused."""
    pyint8.inspect(server.url)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pyint8.inspect(server.url)
        except RemoteError as error:
            code = 0 if "spawn" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
