"""`pyint8.convert` by the ranks of a process group: the files of one process, each written by one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convert_cases as cases
import pytest
import torch
import torch.distributed as dist
from rank_processes import Outcome, RankProcesses
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint.journal import Journal
from pyint8.checkpoint.journals import journal_file
from pyint8.cli.main import main
from pyint8.errors import OptionError
from pyint8.host.locks import lock

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two() -> Iterator[RankProcesses]:
    with RankProcesses(2, are_forked=True) as ranks:
        yield ranks


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def alone(source: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    torch.manual_seed(0)
    pyint8.convert(source, folder, device="cpu", progress=False, **{"max_shard_size": cases.SIZE, **options})
    return files(folder)


def values(outcomes: list[Outcome]) -> list[Any]:
    assert [outcome.text or outcome.error for outcome in outcomes if outcome.error] == []
    return [outcome.value for outcome in outcomes]


# --- the same files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert_fresh_head"])
def test_the_files_of_one_process(two: RankProcesses, name: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    source = checkpoints.folder(ZOO[name], "bf16")
    expected, target = alone(source, tmp_path / "alone"), tmp_path / "work" / "int8"
    read = values(two.run(cases.convert, source, target))
    assert files(target) == expected
    assert os.listdir(target.parent) == ["int8"]
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert name == "bert_fresh_head" or all(0 < each < total for each in read)  # of that one tensor is nearly all


@pytest.mark.parametrize(
    "options",
    [
        {"max_shard_size": "5GB"},
        {"checksums": True},
        {"dtype": torch.float16},
        {"config": pyint8.Int8Config(skip_modules=["k_proj"])},
    ],
    ids=str,
)
def test_with_options(two: RankProcesses, options: dict[str, Any], old: Path, tmp_path: Path) -> None:
    expected, target = alone(old, tmp_path / "alone", **options), tmp_path / "int8"
    read = values(two.run(cases.with_options, old, target, options))
    assert files(target) == expected
    assert (0 in read) == ("max_shard_size" in options)  # of one file


def test_other_files_stay_and_old_ones_go(two: RankProcesses, old: Path, tmp_path: Path) -> None:
    expected, target = alone(old, tmp_path / "alone"), tmp_path / "int8"
    alone(old, target, max_shard_size="20KB")
    (target / "mine").write_text("mine")
    values(two.run(cases.convert, old, target))
    assert files(target) == expected | {"mine": b"mine"}


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "error", "stays"),
    [("full", "WriteError", False), ("gone", "ReadError", True), ("Ctrl-C", "KeyboardInterrupt", True)],
)
def test_all_fail_together(
    two: RankProcesses, rank: int, kind: str, error: str, stays: bool, old: Path, tmp_path: Path
) -> None:
    target = tmp_path / "work" / "int8"
    target.mkdir(parents=True)
    (target / "mine").write_text("mine")
    outcomes = two.run(cases.failing, old, target, rank, 4, kind)
    assert outcomes[rank].error == error
    assert outcomes[1 - rank].error == "RankError"
    assert f"rank {rank} of 2 failed: {error}" in outcomes[1 - rank].text
    assert abs(outcomes[0].at - outcomes[1].at) < 5
    assert files(target) == {"mine": b"mine"}
    assert (len(os.listdir(target.parent)) == 2) == stays
    expected = alone(old, tmp_path / "alone")
    read = values(two.run(cases.convert, old, target))
    assert files(target) == expected | {"mine": b"mine"}
    assert os.listdir(target.parent) == ["int8"]
    again = sum(values(two.run(cases.convert, old, tmp_path / "again")))
    assert (sum(read) < again) == stays  # it was gone on with


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_before_another_has_begun(two: RankProcesses, rank: int, old: Path, tmp_path: Path) -> None:
    """The first rank takes away what the other is about to write to: the error that counts is the one before."""
    target = tmp_path / "work" / "int8"
    outcomes = two.run(cases.failing_soon, old, target, rank)
    assert outcomes[rank].error == "WriteError"
    assert outcomes[1 - rank].error == "RankError"
    assert f"rank {rank} of 2 failed: WriteError" in outcomes[1 - rank].text
    assert not os.listdir(target.parent)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed(two: RankProcesses, rank: int, old: Path, tmp_path: Path) -> None:
    """The others stop soon; what is there is gone on with, by ranks or by one process."""
    target, expected = tmp_path / "work" / "int8", alone(old, tmp_path / "alone")
    with RankProcesses(2, are_forked=True) as ranks:
        outcomes = ranks.run(cases.failing, old, target, rank, 4, "killed")
    assert outcomes[rank].error == "gone"
    assert outcomes[1 - rank].error == "RankError"
    assert not target.exists()
    if rank == 0:
        read = sum(values(two.run(cases.convert, old, target)))
    else:
        options: Any = {"device": "cpu", "max_shard_size": cases.SIZE}
        read = pyint8.convert(old, target, **options).checkpoint_bytes
    assert files(target) == expected
    assert os.listdir(target.parent) == ["int8"]
    assert read < 0.95 * sum(path.stat().st_size for path in old.glob("*.safetensors"))


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float16},
        {"max_shard_size": "30KB"},
        {"config": pyint8.Int8Config(threshold=1.0)},
        {"config": pyint8.Int8Config(strict=False)},
        {"rms_norm_eps": 0.5},
    ],
    ids=str,
)
def test_ranks_that_are_not_called_alike(two: RankProcesses, other: Any, old: Path, tmp_path: Path) -> None:
    for outcome in two.run(cases.with_other_options, old, tmp_path / "int8", [{}, other]):
        assert outcome.error == "OptionError"
        assert "about to convert different things" in outcome.text
    for outcome in two.run(cases.into_other_folders, old, [tmp_path / "a", tmp_path / "b"]):
        assert outcome.error == "OptionError"
    for wrong, outcome in enumerate(two.run(cases.with_other_options, old, tmp_path / "int8", [{}, {"dtype": "x"}])):
        assert outcome.error == ["RankError", "OptionError"][wrong]
    assert os.listdir(tmp_path) == []


def test_a_rank_of_an_earlier_attempt_that_still_runs(old: Path, tmp_path: Path) -> None:
    target, staging = tmp_path / "int8", tmp_path / ".int8.saving-resumed"
    staging.mkdir()
    with Journal(journal_file(str(staging), 1), "some work"):
        locked = lock(journal_file(str(staging), 1))
        assert locked is not None
        with pytest.raises(OptionError, match=r"a rank of an earlier attempt, is writing .*int8"):
            pyint8.convert(old, target, device="cpu")
        os.close(locked)
    assert alone(old, target) == alone(old, tmp_path / "alone")
    assert sorted(os.listdir(tmp_path)) == ["alone", "int8"]


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_group_of_a_launcher(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one process here, which is no different from none."""
    begun, group_of = [], dist.init_process_group

    def begin(backend: str) -> None:
        begun.append(backend)
        group_of(backend, store=dist.HashStore(), rank=0, world_size=1)

    monkeypatch.setattr(dist, "init_process_group", begin)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["convert", str(old), str(tmp_path / "int8"), "--device", "cpu"]) == 0
    assert begun == ["gloo"]
    assert not dist.is_initialized()
    monkeypatch.delenv("WORLD_SIZE")
    assert files(tmp_path / "int8") == alone(old, tmp_path / "alone", max_shard_size="5GB")


@pytest.mark.skipif(os.environ.get("PYINT8_TEST_TORCHRUN") != "1", reason="takes half a minute; PYINT8_TEST_TORCHRUN=1")
def test_processes_that_torchrun_starts(old: Path, tmp_path: Path) -> None:
    expected, target = alone(old, tmp_path / "alone"), tmp_path / "int8"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pyint8"]
    arguments = ["convert", old, target, "--device", "cpu", "--max-shard-size", cases.SIZE, "--json"]
    ran = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout)["folder"] == str(target)  # one speaks
    assert files(target) == expected


def test_processes_that_cannot_reach_each_other(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["convert", str(old), str(tmp_path / "int8")]) == 1
    assert "RANK, MASTER_ADDR, MASTER_PORT is not set" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
