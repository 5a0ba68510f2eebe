"""Ranks on GPUs of their own, over NCCL; the program can be run by hand, too (`ranks_program.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import PREQUANTIZED, ZOO, CheckpointStore

PROGRAM = Path(__file__).with_name("ranks_program.py")
NAMES = ("llama", "gpt2", "mixtral", "qwen3_moe", "bert_fresh_head")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_over_nccl(checkpoints: CheckpointStore, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"fewer than {size} GPUs")
    folders = [checkpoints.folder(ZOO[name], "bf16") for name in NAMES]
    folders += [checkpoints.folder(ZOO[name], PREQUANTIZED) for name in ("llama", "gpt2")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), PROGRAM]
    ended = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found.pop("failures")["seconds_between_ranks"] < 1
    for name, of_model in found.items():
        assert of_model["share"] < 0.9, name  # of tiny tensors, many are read whole
        assert of_model["more_memory"] <= 4 << 20, name
