"""Writes all files of a checkpoint."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyint8.checkpoint.shards import shards_of
from pyint8.checkpoint.shards_writer import ShardsWriter
from pyint8.checkpoint.writer import TensorPlan
from pyint8.errors import CheckpointError

PLANS = [TensorPlan(f"t{number:02}", "U8", (1000 + number,)) for number in range(40)]
SHARDS = shards_of(PLANS, 5000)


def value(plan: TensorPlan) -> bytes:
    return bytes(int(plan.name[1:]) for _ in range(plan.nbytes))


def assert_all_there(folder: Path) -> None:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == {plan.name for plan in PLANS}
    assert all(torch.equal(found[plan.name], torch.tensor(list(value(plan)), dtype=torch.uint8)) for plan in PLANS)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_several_threads_write(tmp_path: Path) -> None:
    with ShardsWriter(str(tmp_path), SHARDS) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda plan: writer.write(plan.name, [value(plan)]), PLANS))
        writer.sync()
        writer.finish()
    assert_all_there(tmp_path)


def test_files_are_open_only_while_they_are_written(tmp_path: Path) -> None:
    before = open_files()
    with ShardsWriter(str(tmp_path), SHARDS) as writer:
        for plan in PLANS:
            writer.write(plan.name, [value(plan)])
            assert open_files() - before <= 1
        assert open_files() == before


def test_what_is_done_stays(tmp_path: Path) -> None:
    done = PLANS[::3]
    with ShardsWriter(str(tmp_path), SHARDS) as writer:
        for plan in done:
            writer.write(plan.name, [value(plan)])
    with ShardsWriter(str(tmp_path), SHARDS, {plan.name for plan in done}) as writer:
        for plan in PLANS:
            if plan not in done:
                writer.write(plan.name, [value(plan)])
        writer.finish()
    assert_all_there(tmp_path)


def test_a_tensor_that_was_not_written_is_named(tmp_path: Path) -> None:
    with ShardsWriter(str(tmp_path), SHARDS) as writer:
        for plan in PLANS[:-1]:
            writer.write(plan.name, [value(plan)])
        with pytest.raises(CheckpointError, match="not written") as raised:
            writer.finish()
    assert raised.value.tensor == "t39"
