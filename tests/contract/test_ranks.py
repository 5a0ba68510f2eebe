"""Ranks of a process group that load together: each reads its part, all have the same model, and fail together."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_cases as cases
import torch
from checksums import add_checksums, damage
from plain_models import Net
from range_server import serving
from rank_processes import Outcome, RankProcesses
from safetensors.torch import load_file, save_file
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8.remote.folder import _FIRST_BYTES

pytestmark = pytest.mark.slow

SHORT_LIST = {
    2: ["llama", "llama_sharded", "gpt2", "t5", "bert_fresh_head", "mixtral", "qwen3_moe", "gpt_oss"],
    3: ["llama", "gpt2", "mixtral"],
}
TIMES = 20


@pytest.fixture(scope="module")
def two() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three() -> Iterator[RankProcesses]:
    with RankProcesses(3) as ranks:
        yield ranks


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> RankProcesses:
    found: RankProcesses = request.getfixturevalue({2: "two", 3: "three"}[request.param])
    return found


def values(outcomes: list[Outcome]) -> list[Any]:
    assert [outcome.text or outcome.error for outcome in outcomes if outcome.error] == []
    return [outcome.value for outcome in outcomes]


@pytest.fixture
def llama(checkpoints: CheckpointStore) -> Path:
    return Path(checkpoints.folder(ZOO["llama"], "bf16"))


# --- the same models --------------------------------------------------------------------------------------------------


def test_all_ranks_have_what_one_has_alone(ranks: RankProcesses, checkpoints: CheckpointStore) -> None:
    folders = [Path(checkpoints.folder(ZOO[name], "bf16")) for name in SHORT_LIST[ranks.size]]
    folders += [Path(checkpoints.folder(ZOO[name], PREQUANTIZED)) for name in ("llama", "gpt2")]
    for shares in values(ranks.run(cases.same_as_alone, folders)):
        assert all(share < 0.8 for share in shares)  # of tiny tensors, many are read whole


def test_experts_in_int8(ranks: RankProcesses, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    mixture = checkpoints.folder(ZOO["mixtral"], "bf16")
    config = pyint8.Int8Config(experts=True)
    for fused in (False, True):
        pyint8.convert(mixture, tmp_path / str(fused), device="cpu", config=config, fused_experts=fused, progress=False)
    values(ranks.run(cases.same_as_alone, [tmp_path / "False", tmp_path / "True"]))
    folders = [Path(checkpoints.folder(ZOO[name], "bf16")) for name in ("mixtral", "gpt_oss")]
    for shares in values(ranks.run(cases.same_as_alone, folders, pyint8.Int8Config(experts=True))):
        assert all(share < 0.8 for share in shares)


def test_plain_modules(ranks: RankProcesses, tmp_path: Path) -> None:
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    assert all(share < 0.8 for share in values(ranks.run(cases.plain_same_as_alone, tmp_path)))


def test_of_a_server_each_rank_asks_for_its_part(ranks: RankProcesses, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    module = cases.big_net()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    total = sum(tensor.nbytes for tensor in module.state_dict().values())
    with serving(tmp_path) as server:
        values(ranks.run(cases.of_a_server, server.url, tmp_path))
        ranges = {(each.start, each.nbytes) for each in server.requests if each.nbytes > _FIRST_BYTES}
        assert total * 0.99 <= sum(nbytes for _, nbytes in ranges) <= total  # without what is small, and headers
        assert server.asked() <= total * 1.1  # a server that is too busy is asked again


def test_each_rank_reads_its_part_and_needs_no_more_memory(ranks: RankProcesses, tmp_path: Path) -> None:
    module = cases.big_net(cases.LAYERS)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    sizes = [tensor.nbytes for tensor in module.state_dict().values()]
    for read, together, alone in values(ranks.run(cases.share_and_memory, tmp_path)):
        assert sum(sizes) / ranks.size <= read <= sum(sizes) / ranks.size * 1.01
        assert together < alone + sum(sizes) / 4  # what comes and goes, and gloo's copies, make 20 MB of difference


def test_groups_of_some_ranks_and_of_one(three: RankProcesses, llama: Path) -> None:
    whole = values(three.run(cases.of_one, llama))
    some = values(three.run(cases.in_part, llama))
    assert len(set(whole)) == 1
    assert some[1] is None
    assert max(some[0], some[2]) < 0.8 * whole[0]


# --- failures ---------------------------------------------------------------------------------------------------------


def copy_for_rank_1(llama: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """The checkpoint as rank 1 finds it."""
    copied = Path(shutil.copytree(llama, folder / "of rank 1"))
    change(copied)
    return copied


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def take_away(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if "mlp" in name)
    tensors[name][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def flip_a_bit(folder: Path) -> None:
    damage(add_checksums(folder)["model.layers.0.mlp.up_proj.weight"], 1000)


FOLDERS = {
    "a file is cut": (cut, "TruncatedError"),
    "a file is missing": (take_away, "CheckpointNotFoundError"),
}
EVERYBODYS = {"NonFiniteWeightError": put_nan, "ChecksumError": flip_a_bit}
MISHAPS = {
    "an exception": ("RuntimeError", {}),
    "Ctrl-C": ("KeyboardInterrupt", {}),
    "nothing": ("OptionError", {"device_map": "auto"}),
}


def check_failures(outcomes: list[Outcome], broken: int, error: str) -> None:
    """On every rank, every time, and everywhere within a second."""
    for at_once in zip(*values(outcomes), strict=True):
        for rank, outcome in enumerate(at_once):
            if rank == broken:
                assert outcome.error == error
                own = f"{error}: {outcome.text}" if outcome.text else error
            else:
                assert outcome.error == "RankError", outcome
        for rank, outcome in enumerate(at_once):
            if rank != broken:
                assert outcome.text == f"rank {broken} of {len(at_once)} failed: {own}"
        moments = [outcome.at for outcome in at_once]
        assert max(moments) - min(moments) < 1


@pytest.mark.parametrize("how", FOLDERS)
def test_a_checkpoint_that_is_damaged_for_one_rank(ranks: RankProcesses, llama: Path, tmp_path: Path, how: str) -> None:
    change, error = FOLDERS[how]
    other = copy_for_rank_1(llama, tmp_path, change)
    check_failures(ranks.run(cases.failing, llama, {1: other}, 1, "nothing", TIMES, {}), 1, error)


@pytest.mark.parametrize("how", MISHAPS)
@pytest.mark.parametrize("broken", [0, 1])
def test_a_mishap_of_one_rank(ranks: RankProcesses, llama: Path, how: str, broken: int) -> None:
    error, arguments = MISHAPS[how]
    check_failures(ranks.run(cases.failing, llama, {}, broken, how, TIMES, arguments), broken, error)


@pytest.mark.parametrize("error", EVERYBODYS)
def test_bad_values_are_every_ranks_own_error(ranks: RankProcesses, llama: Path, tmp_path: Path, error: str) -> None:
    folders = dict.fromkeys(range(ranks.size), copy_for_rank_1(llama, tmp_path, EVERYBODYS[error]))
    for times in values(ranks.run(cases.failing, llama, folders, 1, "nothing", TIMES, {})):
        for outcome in times:
            assert outcome.error == error
            assert "mlp" in outcome.text


def test_ctrl_c_at_any_moment(two: RankProcesses, llama: Path) -> None:
    """It may come when all is over; until then, it is everybody's."""
    others, own = values(two.run(cases.failing, llama, {}, 1, "Ctrl-C at any moment", 2 * TIMES, {}))
    assert {outcome.error for outcome in own} <= {"KeyboardInterrupt", None}
    assert {outcome.text for outcome in others} == {"rank 1 of 2 failed: KeyboardInterrupt", ""}
    for theirs, mine in zip(others, own, strict=True):
        assert theirs.error is None or mine.error == "KeyboardInterrupt"


def test_ctrl_c_when_all_is_over_stops_no_other(ranks: RankProcesses, llama: Path) -> None:
    *others, own = values(ranks.run(cases.failing, llama, {}, ranks.size - 1, "Ctrl-C at the end", TIMES, {}))
    assert {outcome.error for outcome in own} == {"KeyboardInterrupt"}
    assert {outcome.error for of_rank in others for outcome in of_rank} == {None}


@pytest.mark.parametrize(
    "how", ["other transformers", "other release", "another model", "other values", "other options"]
)
def test_ranks_that_do_not_load_the_same(
    ranks: RankProcesses, llama: Path, checkpoints: CheckpointStore, tmp_path: Path, how: str
) -> None:
    models = {"another model": checkpoints.folder(ZOO["qwen2"], "bf16"), "other values": llama}
    others = {1: copy_for_rank_1(models[how], tmp_path, put_nan)} if how in models else {}
    arguments = {"options": pyint8.StreamOptions(host_scratch=1 << 20)} if how == "other options" else {}
    outcomes = ranks.run(cases.failing, llama, others, 1, how if how in cases.BREAKS else "nothing", TIMES, arguments)
    named = {"other transformers": "transformers (", "other options": "scratch", "another model": "the tensors' names"}
    named |= {"other values": "the tensors' values (", "other release": f"pyint8 ({pyint8.__version__} and 0.0.1)"}
    for at_once in zip(*values(outcomes), strict=True):
        for outcome in at_once:
            assert outcome.error == "RankError"
            assert f"about to load different things: ranks 0 and 1 differ in {named[how]}" in outcome.text
        moments = [outcome.at for outcome in at_once]
        assert max(moments) - min(moments) < 1


def test_a_rank_that_is_gone(llama: Path) -> None:
    with RankProcesses(2) as ranks:
        began = time.monotonic()
        outcomes = ranks.run(cases.dies, llama)
        seconds = time.monotonic() - began
    assert [outcome.error for outcome in outcomes] == ["RankError", "gone"]
    assert "cannot reach each other" in outcomes[0].text
    assert seconds < 60


PROGRAM = """
import os, sys, time, torch, torch.distributed as dist, pyint8
dist.init_process_group("gloo")
if dist.get_rank() and sys.argv[2] == "dies":
    from pyint8.report.recorder import Recorder
    Recorder.landed = lambda *_: os.kill(os.getpid(), 9)
model = pyint8.load(sys.argv[1], "cpu", process_group=dist.group.WORLD)
print("loaded", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("what", "code"), [("lives", 0), ("dies", 1)])
def test_under_torchrun(llama: Path, tmp_path: Path, what: str, code: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*command, program, llama, what], capture_output=True, text=True, timeout=120)
    assert (ended.returncode != 0) == bool(code), ended.stderr
    assert ended.stdout.count("loaded") == (0 if code else 2)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device_map": "auto"}, 'each rank loads onto one device: "cuda" for'),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "each rank loads onto one device"),
        ({"cache": True}, "cache and process_group do not go together"),
    ],
    ids=str,
)
def test_what_ranks_cannot_do_together(two: RankProcesses, llama: Path, arguments: Any, words: str) -> None:
    for outcome in two.run(cases.refused, llama, arguments):
        assert outcome.error == "OptionError"
        assert words in outcome.text


def test_a_backend_that_does_not_serve_the_device(two: RankProcesses, llama: Path) -> None:
    for outcome in two.run(cases.backend_for_gpus, llama):
        assert outcome.error == "OptionError"
        assert "cannot gather memory of cpu (it serves cuda by nccl); make one with the backend gloo" in outcome.text


def test_what_is_no_group_of_this_process(two: RankProcesses, llama: Path) -> None:
    for found in values(two.run(cases.refused_group, llama)):
        assert {outcome.error for outcome in found} == {"OptionError"}
        assert all("it must be a torch.distributed.ProcessGroup" in outcome.text for outcome in found)


# --- takeover ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["BitsAndBytesConfig", "Int8Config"])
def test_loads_of_transformers_in_a_block(two: RankProcesses, llama: Path, own: bool) -> None:
    for together, alone in values(two.run(cases.taken_over, llama, own)):
        assert len(together) == 2
        assert all(nbytes < 0.8 * alone for nbytes in together)


@pytest.mark.parametrize("stage", ["before", "in transformers", "after"])
def test_what_ends_a_block_on_one_rank_ends_it_on_all(two: RankProcesses, llama: Path, stage: str) -> None:
    own, other = reversed(two.run(cases.block_that_one_leaves, llama, stage))
    assert own.error == ("OSError" if stage == "in transformers" else "ZeroDivisionError")
    assert other.error == "RankError"
    assert other.text.startswith(f"rank 1 of 2 failed: {own.error}: ")
    assert abs(own.at - other.at) < 1
    values(two.run(cases.taken_over, llama, False))


def test_a_planned_map_in_a_block(two: RankProcesses, llama: Path) -> None:
    for outcome in two.run(cases.planned_in_a_block, llama):
        assert outcome.error == "OptionError"
        assert "each rank loads onto one device" in outcome.text
    assert torch.get_default_dtype() == torch.float32
