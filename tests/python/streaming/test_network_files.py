"""Files on a file system that knows neither direct reads nor shared mappings, and reads less than it is asked for.

tests/cpp/support/network_file_system.cpp makes all files such; it is looked for beside PYINT8_TEST_LIBCUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from zoo import ZOO, CheckpointStore

pytestmark = pytest.mark.slow

_LOAD = """
import hashlib, json, os, sys, tempfile
import pyint8
from pyint8.errors import Pyint8Error
digest = hashlib.sha256()
with tempfile.TemporaryFile() as file:
    file.write(bytes(60000))
    file.flush()
    at_once = len(os.pread(file.fileno(), 60000, 0))
try:
    options = pyint8.StreamOptions(direct_io=sys.argv[2] == "direct")
    model, report = pyint8.load(sys.argv[1], device_map="cpu", return_report=True, options=options)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if hasattr(tensor, "untyped_storage"):
            digest.update(bytes(tensor.contiguous().untyped_storage()))
    print(json.dumps({"digest": digest.hexdigest(), "bytes": report.checkpoint_bytes, "at once": at_once}))
except Pyint8Error as error:
    print(json.dumps({"error": str(error)}))
"""


def load(folder: Path, how: str, preload: Path | None) -> dict[str, object]:
    environment = dict(os.environ) | ({"LD_PRELOAD": str(preload)} if preload else {})
    command = [sys.executable, "-c", _LOAD, str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture
def network() -> Path:
    driver = os.environ.get("PYINT8_TEST_LIBCUDA")
    if driver is None:
        assert os.environ.get("PYINT8_REQUIRE_FAKE_CUDA") != "1", "PYINT8_TEST_LIBCUDA is not set"
        pytest.skip("PYINT8_TEST_LIBCUDA is not set")
    return Path(driver).with_name("libnetworkfs.so")


@pytest.mark.parametrize("how", ["direct", "buffered"])
def test_the_same_model(how: str, network: Path, checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama_sharded"], "bf16")
    found = load(folder, how, network)
    assert found.pop("at once") == 50001
    assert "error" not in found
    without = load(folder, how, None)
    assert without.pop("at once") == 60000
    assert found == without


def test_a_shard_cut_short(network: Path, copy_of: object) -> None:
    folder: Path = copy_of("llama", "bf16")  # type: ignore[operator]
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 70000)
    assert "model.safetensors" in str(load(folder, "direct", network)["error"])
