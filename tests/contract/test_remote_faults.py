"""What goes wrong with checkpoints under URLs: it passes, or is an error with URL and byte, and nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from collected import of_kinds
from oracle import compare_models, show
from plain_models import Net, drawn, on_meta, saved
from range_server import Fault, RangeServer, serving

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import CheckpointNotFoundError, FileChangedError, OptionError, PlacementError, RemoteError
from pyint8.streaming.stream import TensorStream

pytest.importorskip("obstore")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("far_away", "threads_of_obstore"),
]

CPU = {"": "cpu"}
IMPATIENT = {"client_options": {"read_timeout": "300ms", "timeout": "1s"}}


@pytest.mark.usefixtures("threads_of_obstore", "nothing_left")
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
    before = of_kinds([TensorStream])
    with pytest.raises(kind_of_error) as caught:
        pyint8.load(changeable.url, CPU, storage_options=IMPATIENT)
    assert caught.value.path == f"{changeable.url}/model.safetensors"
    assert caught.value.offset >= 20_000
    assert caught.value.tensor in open_checkpoint(changeable.folder)
    del caught
    gc.collect()
    assert of_kinds([TensorStream], but=before) == []


@pytest.mark.usefixtures("threads_of_obstore", "nothing_left")
@pytest.mark.parametrize("beyond", [0, 20_000], ids=["headers", "shards"])
def test_ctrl_c(changeable: RangeServer, beyond: int) -> None:
    pyint8.load(changeable.folder, CPU)  # imports take long
    changeable.faults = [Fault("stall", beyond=beyond)]
    options = {"client_options": {"read_timeout": "1500ms"}}
    interrupted: list[float] = []

    def interrupt() -> None:
        while not any(request.start >= beyond for request in changeable.requests):
            time.sleep(0.01)
        time.sleep(0.2)
        interrupted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        pyint8.load(changeable.url, CPU, storage_options=options)
    assert time.monotonic() - interrupted[0] < 0.6  # long before the server is given up
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


def test_storage_options(server: RangeServer) -> None:
    with pytest.raises(OptionError, match="storage_options are for URLs"):
        pyint8.load(server.folder, storage_options={"region": "x"})
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
