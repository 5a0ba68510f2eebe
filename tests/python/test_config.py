"""What may be asked for: Int8Config, StreamOptions, and the environment behind it."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from pyint8 import Int8Config, StreamOptions
from pyint8.errors import OptionError
from pyint8.host.cpus import usable_cpus

MIB = 1 << 20
LIMITS = {
    "threads": (1, 1024),
    "slots_per_thread": (1, 64),
    "slot_bytes": (8192, 1 << 30),
    "device_scratch": (MIB, 1 << 40),
    "host_scratch": (MIB, 1 << 40),
}


def test_defaults_are_those_of_llm_int8() -> None:
    config = Int8Config()
    assert (config.threshold, config.skip_modules) == (6.0, None)
    assert (config.has_fp16_weight, config.fp32_cpu_offload) == (False, False)


def test_values_become_what_bitsandbytes_takes() -> None:
    given = ["lm_head"]
    config = Int8Config(threshold=0, skip_modules=given)
    given.append("changed afterwards")
    assert isinstance(config.threshold, float)
    assert config.skip_modules == ("lm_head",)
    assert Int8Config(skip_modules=[]).skip_modules == ()
    with pytest.raises(AttributeError):
        config.threshold = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("value", [-0.1, math.nan, "6", None, True])
def test_threshold_is_a_number_from_zero(value: Any) -> None:
    with pytest.raises(OptionError, match=rf"threshold is {value!r}; it must be a number of at least 0"):
        Int8Config(threshold=value)


@pytest.mark.parametrize("value", ["lm_head", ["lm_head", 3], [None], 5])
def test_skip_modules_is_a_sequence_of_names(value: Any) -> None:
    with pytest.raises(OptionError, match=r"skip_modules is .*; it must be a sequence of module names, or None"):
        Int8Config(skip_modules=value)


@pytest.mark.parametrize("name", ["has_fp16_weight", "fp32_cpu_offload"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_switches_of_the_config_are_bool(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value!r}; it must be True or False"):
        Int8Config(**{name: value})


def test_stream_defaults() -> None:
    options = StreamOptions()
    assert (options.slots_per_thread, options.slot_bytes) == (2, None)
    assert (options.device_scratch, options.host_scratch) == (256 * MIB, 32 * MIB)
    assert (options.direct_io, options.libcuda, options.threads) == (False, "libcuda.so.1", None)


@pytest.mark.parametrize("name", LIMITS)
def test_stream_options_have_limits(name: str) -> None:
    low, high = LIMITS[name]
    for good in (low, high):
        assert getattr(StreamOptions(**{name: good}), name) == good
    for bad in (low - 1, high + 1, 0, -low, float(low), str(low), True):
        with pytest.raises(OptionError, match=rf"{name} is .*; it must be an integer from {low} to {high}"):
            StreamOptions(**{name: bad})


def test_slots_share_a_ring_that_does_not_grow_with_the_workers() -> None:
    for threads, slot in ((1, 4.0), (10, 4.0), (12, 3.5), (14, 3.0), (28, 1.5), (32, 1.25), (1024, 0.25)):
        assert StreamOptions().slot_size(threads) == slot * MIB
    assert StreamOptions(slots_per_thread=3).slot_size(28) == MIB
    assert StreamOptions(slot_bytes=8192).slot_size(28) == 8192


def test_slots_are_whole_blocks() -> None:
    assert StreamOptions(slot_bytes=3 * 4096).slot_bytes == 3 * 4096
    with pytest.raises(OptionError, match="slot_bytes is 12289; it must be a multiple of 4096"):
        StreamOptions(slot_bytes=3 * 4096 + 1)


@pytest.mark.parametrize(("name", "value"), [("direct_io", "no"), ("direct_io", 1), ("libcuda", 7), ("libcuda", None)])
def test_stream_options_have_types(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value!r}"):
        StreamOptions(**{name: value})


def test_threads_default_to_all_usable_cpus_but_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StreamOptions(threads=700).worker_threads() == 700
    for usable, workers in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 4), (8, 6), (16, 14), (22, 14), (200, 14)):
        monkeypatch.setattr("pyint8.config.usable_cpus", lambda usable=usable: usable)
        assert StreamOptions().worker_threads() == workers
        assert StreamOptions().worker_threads(gpus=0) == workers
    assert StreamOptions().worker_threads(gpus=2) == 26
    assert StreamOptions().worker_threads(gpus=3) == 32
    assert StreamOptions().worker_threads(gpus=100) == 32


def test_workers_of_a_rank_leave_cpus_to_what_ranks_do_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StreamOptions(threads=700).for_ranks().threads == 700
    for usable, workers in ((1, 1), (2, 2), (4, 4), (8, 5), (16, 10), (22, 13), (200, 14)):
        monkeypatch.setattr("pyint8.config.usable_cpus", lambda usable=usable: usable)
        assert StreamOptions().for_ranks().threads == workers


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("PYINT8_THREADS", "7", "threads", 7),
        ("PYINT8_SLOTS_PER_THREAD", "3", "slots_per_thread", 3),
        ("PYINT8_SLOT_BYTES", "65536", "slot_bytes", 65536),
        ("PYINT8_DEVICE_SCRATCH", str(3 * MIB), "device_scratch", 3 * MIB),
        ("PYINT8_HOST_SCRATCH", str(2 * MIB), "host_scratch", 2 * MIB),
        ("PYINT8_DIRECT_IO", "1", "direct_io", True),
        ("PYINT8_DIRECT_IO", "True", "direct_io", True),
        ("PYINT8_DIRECT_IO", "false", "direct_io", False),
        ("PYINT8_DIRECT_IO", "0", "direct_io", False),
        ("PYINT8_LIBCUDA", "/opt/libcuda.so", "libcuda", "/opt/libcuda.so"),
    ],
)
def test_every_option_has_a_variable(
    variable: str, text: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = StreamOptions(**{name: value})
    assert StreamOptions.from_environment({variable: text, "PYINT8_OTHER": "x", "THREADS": "9"}) == expected
    monkeypatch.setenv(variable, text)
    assert StreamOptions.from_environment() == expected


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        ("PYINT8_THREADS", "many", "is 'many'; it must be an integer"),
        ("PYINT8_THREADS", "", "is ''; it must be an integer"),
        ("PYINT8_THREADS", "0", "threads is 0; it must be an integer from 1 to 1024"),
        ("PYINT8_SLOTS_PER_THREAD", "65", "from 1 to 64"),
        ("PYINT8_SLOT_BYTES", "2MiB", "is '2MiB'; it must be an integer"),
        ("PYINT8_SLOT_BYTES", "10000", "multiple of 4096"),
        ("PYINT8_DEVICE_SCRATCH", "1.5", "must be an integer"),
        ("PYINT8_HOST_SCRATCH", "-1", "must be an integer from"),
        ("PYINT8_DIRECT_IO", "yes", "is 'yes'; it must be 0 or 1"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, problem: str) -> None:
    with pytest.raises(OptionError, match=f"environment variable {variable}.*{problem}"):
        StreamOptions.from_environment({variable: text})


def test_an_empty_environment_changes_nothing() -> None:
    assert StreamOptions.from_environment({}) == StreamOptions()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "150000\n"}, 8),
    ],
    ids=["no cgroup", "v2 max", "v2 2.5", "v2 2", "v2 0.05", "v2 64", "v1 none", "v1 1.5", "v1 half"],
)
def test_cpus_by_cgroup(files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == cpus


def test_cpus_by_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("700000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 11})
    assert usable_cpus(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cpus(tmp_path) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus(tmp_path) == 1
