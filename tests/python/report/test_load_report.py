"""The LoadReport's arithmetic and text."""

import copy
import dataclasses
import json
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyint8 import LoadReport
from pyint8.report import Recorder, announce, collected, readable_size

PHASES = ["read headers", "build", "stream", "finish"]


class Clock:
    """time.perf_counter in whole seconds, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_phases_are_there_from_the_start() -> None:
    report = LoadReport()
    assert report.seconds == dict.fromkeys(PHASES, 0.0)
    assert report.total_seconds == 0
    assert report.gigabytes_per_second == 0
    assert LoadReport().seconds is not report.seconds


def test_a_phase_inside_another_counts_for_itself_only(clock: Clock) -> None:
    recorder = Recorder()
    with recorder.phase("build"):
        clock.passes(1)
        with recorder.phase("stream"):
            clock.passes(2)
            with recorder.phase("read headers"):
                clock.passes(4)
            clock.passes(8)
        with recorder.phase("finish"):
            clock.passes(16)
        clock.passes(32)
    assert recorder.report.seconds == {"build": 33, "stream": 10, "read headers": 4, "finish": 16}
    assert recorder.report.total_seconds == 63


def test_a_phase_entered_again_adds_up(clock: Clock) -> None:
    recorder = Recorder()
    for _ in range(3):
        with recorder.phase("stream"):
            clock.passes(2)
    with recorder.phase("stream"), recorder.phase("stream"):
        clock.passes(1)
    assert recorder.report.seconds["stream"] == 7


def test_a_phase_counts_when_it_fails(clock: Clock) -> None:
    recorder = Recorder()

    def fail() -> None:
        with recorder.phase("build"):
            clock.passes(1)
            with recorder.phase("stream"):
                clock.passes(2)
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (recorder.report.seconds["build"], recorder.report.seconds["stream"]) == (1, 2)


def test_speed_is_of_the_whole_load() -> None:
    report = LoadReport(checkpoint_bytes=3_000_000_000)
    report.seconds |= {"build": 0.5, "stream": 1.0}
    assert report.gigabytes_per_second == 2.0


def test_text() -> None:
    report = LoadReport(checkpoint_bytes=16_060_000_000, host_peak_bytes=120_000_000)
    report.seconds |= {"read headers": 0.01, "build": 0.2, "stream": 0.5, "finish": 0.04}
    report.tensors.update({"int8": 224, "as stored": 2, "cast": 65})
    report.device_peak_bytes = {"cuda:0": 9_300_000_000}
    experts = {f"model.layers.{number}.mlp.experts.down_proj": 10_000_000 for number in range(5)}
    report.skipped = {"lm_head": "in the list of modules to skip", **dict.fromkeys(experts, "fused experts")}
    report.skipped_bytes = {"lm_head": 1_050_673_152, **experts}
    assert str(report).splitlines() == [
        "read        16.060 GB at 21.41 GB/s",
        "seconds     0.75 (read headers 0.01, build 0.20, stream 0.50, finish 0.04)",
        "tensors     224 int8, 65 cast, 2 as stored",
        "host peak   +0.120 GB",
        "cuda:0      peak 9.300 GB",
        "not int8    1.10 GB",
        "  1.05 GB   in the list of modules to skip: lm_head",
        "  50.0 MB   fused experts: model.layers.0.mlp.experts.down_proj, model.layers.1.mlp.experts.down_proj, "
        "model.layers.2.mlp.experts.down_proj and 2 more",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (65_536, "66 kB"), (4_500_000, "4.5 MB"), (61_100_000_000, "61.10 GB")],
)
def test_sizes_are_readable(nbytes: int, text: str) -> None:
    assert readable_size(nbytes) == text


def test_text_of_an_empty_report() -> None:
    lines = str(LoadReport()).splitlines()
    assert lines[0] == "read        0.000 GB at 0.00 GB/s"
    assert len(lines) == 4


def filled_report() -> LoadReport:
    report = LoadReport(checkpoint_bytes=2_000_000_000, host_peak_bytes=7)
    report.seconds |= {"build": 0.5, "stream": 1.5}
    report.tensors["int8"] += 3
    report.tensors["as stored"] += 1
    report.skipped = {"lm_head": "in the list of modules to skip"}
    report.loading_info = {
        "missing_keys": {"b", "a"},
        "mismatched_keys": {("c", torch.Size([2]), torch.Size([3]))},
        "error_msgs": ["one"],
    }
    return report


def test_a_dict_that_json_takes() -> None:
    found = filled_report().to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["tensors"] == {"int8": 3, "as stored": 1}
    assert found["seconds"]["stream"] == 1.5
    assert found["loading_info"] == {
        "missing_keys": ["a", "b"],
        "mismatched_keys": [["c", [2], [3]]],
        "error_msgs": ["one"],
    }
    assert (found["total_seconds"], found["gigabytes_per_second"]) == (2.0, 1.0)
    assert found.keys() >= {each.name for each in dataclasses.fields(LoadReport)}


def test_asdict_is_right_too() -> None:
    assert dataclasses.asdict(filled_report())["tensors"] == {"int8": 3, "as stored": 1}
    assert copy.deepcopy(filled_report()) == filled_report()
    assert pickle.loads(pickle.dumps(filled_report())) == filled_report()


def test_kinds_that_are_not_there_are_none() -> None:
    report = LoadReport()
    assert report.tensors["int8"] == 0
    assert report.tensors == {}


def test_one_line() -> None:
    line = "2.000 GB in 2.00 s (1.0 GB/s); tensors: 3 int8, 1 as stored"
    assert filled_report().summary() == line


def test_a_notebook_shows_the_text() -> None:
    report = filled_report()
    report.skipped = {"a<b": "x & y"}
    assert report._repr_html_().startswith("<pre>read ")
    assert "x &amp; y: a&lt;b" in report._repr_html_()


def test_reports_are_collected_while_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = LoadReport(), LoadReport(), LoadReport()
    with caplog.at_level("INFO", "pyint8"), collected() as outer:
        announce(first, "a")
        with collected() as inner:
            announce(second, "b")
        announce(third, "c")
    announce(LoadReport(), "d")
    assert [id(each) for each in outer] == [id(first), id(second), id(third)]
    assert [id(each) for each in inner] == [id(second)]
    assert "loaded b: 0.000 GB in 0.00 s" in caplog.text


def test_threads_tell_at_once() -> None:
    recorder = Recorder()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: (recorder.landed(3), recorder.count("int8")), range(20_000)))
    finally:
        sys.setswitchinterval(interval)
    assert recorder.report.checkpoint_bytes == 60_000
    assert recorder.report.tensors == {"int8": 20_000}
