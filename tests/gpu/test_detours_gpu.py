"""Loads onto one GPU over another's bus too: the same model, and the other GPU is as before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import assert_same
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
BORROWED = pyint8.StreamOptions(borrow_gpus=(1,), slot_bytes=8192)


@pytest.mark.parametrize("kind", ["bf16", PREQUANTIZED])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_the_same_model_comes(checkpoints: CheckpointStore, name: str, kind: str) -> None:
    if kind == PREQUANTIZED and name == "qwen3_moe":
        pytest.skip("experts stay 16 bit")
    folder = checkpoints.folder(ZOO[name], kind)
    alone = pyint8.load(folder, device_map=0)
    for _ in range(3):
        assert_same(pyint8.load(folder, device_map=0, options=BORROWED), alone)


def test_the_other_gpu_has_its_memory_back(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    torch.zeros(1, device="cuda:1")  # its context
    pyint8.load(folder, device_map=0, options=BORROWED)
    before = torch.cuda.mem_get_info(1)[0]
    for _ in range(5):
        pyint8.load(folder, device_map=0, options=BORROWED)
    assert torch.cuda.mem_get_info(1)[0] == before


PROGRAM = """
import sys, pyint8, torch
one = pyint8.load(sys.argv[1], device_map=0, options=pyint8.StreamOptions(borrow_gpus=(1,), slot_bytes=8192))
other = pyint8.load(sys.argv[1], device_map=0)
assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
"""


def test_segments_of_torch_that_other_gpus_cannot_write_to(checkpoints: CheckpointStore) -> None:
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-c", PROGRAM, str(checkpoints.folder(ZOO["llama"], "bf16"))]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
