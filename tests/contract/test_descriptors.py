"""A checkpoint of many shards is loaded with few descriptors, and with those that the system leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import ZOO, CheckpointStore

import pyint8

pytestmark = pytest.mark.slow

LOADS = """
import os, resource, sys, threading
import torch, transformers, pyint8
import pyint8.models.transformers.loading

def descriptors():
    return len(os.listdir("/proc/self/fd"))

pyint8.load(sys.argv[2], "cpu")  # whatever opens files for good has done so
before = descriptors()
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (before + int(sys.argv[3]), limits[1]))
model = pyint8.load(sys.argv[1], "cpu")
assert descriptors() == before, (descriptors(), before)
print(sum(float(value.detach().double().sum()) for value in model.parameters()))
"""


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory, checkpoints: CheckpointStore) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    model = ZOO["llama"].cls.from_pretrained(checkpoints.folder(ZOO["llama"], "bf16"), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=10)  # a tensor each
    return folder


@pytest.mark.parametrize("left", [100, 12])
def test_many_shards(many_shards: Path, checkpoints: CheckpointStore, left: int) -> None:
    assert len(list(many_shards.glob("*.safetensors"))) > 15
    small = checkpoints.folder(ZOO["gpt2"], "bf16")
    command = [sys.executable, "-c", LOADS, str(many_shards), str(small), str(left)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    model = pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu")
    assert float(ended.stdout) == sum(float(value.detach().double().sum()) for value in model.parameters())
