"""What a process that torchrun started does differently, without any argument."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.distributed import DistributedConfig
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config, StreamOptions
from pyint8.errors import OptionError, PlacementError
from pyint8.host.processes import processes
from pyint8.models.transformers.parallel import refuse_split_models
from pyint8.report.progress import ByteProgress

Load = Callable[..., Any]


@pytest.mark.parametrize(
    ("processes", "cpus", "workers", "kib"),
    [("1", 128, 14, 3072), ("2", 32, 14, 1536), ("4", 64, 8, 1280), ("8", 128, 4, 1280), ("8", 8, 1, 4096)],
)
def test_processes_of_a_host_share_threads_and_slots(
    processes: str, cpus: int, workers: int, kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr("pyint8.config.usable_cpus", lambda: cpus)
    options = StreamOptions()
    assert (options.worker_threads(), options.slot_size(workers)) == (workers, kib << 10)
    asked = StreamOptions(threads=20, slot_bytes=8192)
    assert (asked.worker_threads(), asked.slot_size(20)) == (20, 8192)


@pytest.mark.parametrize("text", ["", "none", "0", "-3"])
def test_nonsense_in_local_world_size_is_no_sharing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    assert StreamOptions().slot_size(14) == 3 << 20


def test_what_the_launcher_says() -> None:
    assert processes({}) == (1, 1, 0)
    assert processes({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "7"}) == (16, 8, 7)
    assert processes({"WORLD_SIZE": "0", "LOCAL_WORLD_SIZE": "none", "LOCAL_RANK": "-1"}) == (1, 1, 0)


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("0", True), ("1", False), ("7", False)])
def test_one_bar_a_host(rank: str | None, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert ByteProgress(None).is_shown is shown
    assert ByteProgress(True).is_shown


@pytest.mark.parametrize(("world", "device_map", "warned"), [("2", "auto", 1), ("1", "auto", 0), ("2", "cpu", 0)])
def test_a_planned_map_under_torchrun_is_warned_of(
    world: str,
    device_map: str,
    warned: int,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    load(device_map=device_map)
    assert sum('pass device_map="cuda"' in record.getMessage() for record in caplog.records) == warned


@pytest.mark.parametrize(
    "argument",
    [
        {"distributed_config": DistributedConfig(tp_size=2)},
        {"distributed_config": DistributedConfig(fsdp_size=4)},
        {"distributed_config": {"tp_size": 2}},
        {"distributed_config": {"tp_plan": "auto"}},
        {"tp_size": 2},
        {"tp_plan": "auto"},
        {"device_mesh": SimpleNamespace(size=lambda: 2)},
    ],
    ids=", ".join,
)
def test_models_split_over_ranks_are_refused_by_name(
    argument: dict[str, Any], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (name,) = argument
    with pytest.raises(PlacementError, match=rf"{name} splits the model over \d ranks, .*device_map=\"cuda\""):
        load(**argument)


@pytest.mark.parametrize(
    "argument",
    [
        {"distributed_config": DistributedConfig(tp_size=1)},
        {"distributed_config": None},
        {"tp_size": 1},
        {"tp_plan": "auto"},
        {"device_mesh": SimpleNamespace(size=lambda: 1)},
        {},
    ],
    ids=", ".join,
)
def test_one_rank_is_no_split(argument: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_split_models(argument)


@pytest.mark.parametrize("way", ["config", "takeover"])
def test_drop_in_loads_refuse_split_models_too(
    way: str, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers says so to the quantizer by the configuration."""
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    split = DistributedConfig(tp_size=2)
    monkeypatch.setattr(
        tf.PreTrainedModel, "prepare_distribute_model", classmethod(lambda *_, **__: (split, {"": "cpu"}, None))
    )
    wanted = Int8Config() if way == "config" else tf.BitsAndBytesConfig(load_in_8bit=True)
    blocks = nullcontext() if way == "config" else pyint8.takeover()
    with pytest.raises(PlacementError, match="distributed_config splits the model over 2 ranks"), blocks:
        tf.LlamaForCausalLM.from_pretrained(folder, distributed_config=split, quantization_config=wanted)
    assert torch.get_default_dtype() == torch.float32


def test_without_any_group(checkpoints: CheckpointStore) -> None:
    llama = checkpoints.folder(ZOO["llama"], "bf16")
    with pytest.raises(OptionError, match="process_group is 3"):
        pyint8.load(llama, "cpu", process_group=3)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="process_group is 3"), pyint8.takeover(process_group=3):  # type: ignore[arg-type]
        pass
