"""What was done when, as data, a picture and a trace."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pyint8.errors import MissingDependencyError, OptionError
from pyint8.report import Recorder, Span, Timeline, timeline

SPANS = [
    Span("cuda:0", "quantizing", 103.0, 104.0, 50),
    Span("worker 10", "reading", 100.5, 101.5, 200),
    Span("worker 9", "reading", 100.5, 101.0, 100),
    Span("worker 9", "waiting", 101.0, 101.25),
    Span("bus to cuda:0", "copying", 101.5, 102.0, 300),
    Span("Python", "build", 100.25, 100.5),
    Span("Python", "stream", 100.0, 104.0),
    Span("Python, pyint8 head start", "something", 100.0, 100.1),
]


def test_lanes_are_in_order() -> None:
    assert list(Timeline(SPANS).lanes()) == [
        "Python",
        "Python, pyint8 head start",
        "worker 9",
        "worker 10",
        "bus to cuda:0",
        "cuda:0",
    ]


def test_times_are_since_the_start() -> None:
    found = Timeline(SPANS).to_dict()
    assert found["worker 9"] == [["reading", 0.5, 1.0, 100], ["waiting", 1.0, 1.25, 0]]
    assert found["Python"] == [["stream", 0.0, 4.0, 0], ["build", 0.25, 0.5, 0]]


def test_a_trace_for_perfetto(tmp_path: Path) -> None:
    Timeline(SPANS).save(tmp_path / "load.json")
    events = json.loads((tmp_path / "load.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(SPANS)
    (copy,) = [event for event in spans if event["name"] == "copying"]
    assert names[copy["tid"]] == "bus to cuda:0"
    assert (copy["ts"], copy["dur"], copy["args"]) == (1.5e6, 0.5e6, {"bytes": 300})


@pytest.mark.parametrize("spans", [SPANS, []], ids=["some", "none"])
def test_pictures(tmp_path: Path, spans: list[Span]) -> None:
    for name in ("load.png", "load.svg", "load.pdf", "LOAD.PNG"):
        Timeline(spans).save(tmp_path / name)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    text = ElementTree.tostring(ElementTree.parse(tmp_path / "load.svg").getroot(), encoding="unicode")
    for lane in Timeline(spans).lanes():
        assert f"<!-- {lane} -->" in (tmp_path / "load.svg").read_text() or lane in text


def test_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ends in no \.png"):
        Timeline(SPANS).save(tmp_path / "load.gif")


def test_without_matplotlib_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install matplotlib.*perfetto"):
        Timeline(SPANS).save(tmp_path / "load.png")
    Timeline(SPANS).save(tmp_path / "load.json")


def test_a_recorder_notes_phases_and_waits() -> None:
    recorder = Recorder(timeline=True)
    with recorder.phase("build"), recorder.waiting():
        pass
    noted = recorder.report.timeline
    assert noted is not None
    assert [span.what for span in noted.lanes()["Python"]] == ["build", "waiting"]
    assert recorder.report.to_dict()["timeline"]["Python"][0][0] == "build"


def test_nothing_is_noted_unless_it_is_asked_for() -> None:
    recorder = Recorder()
    with recorder.phase("build"), recorder.waiting():
        recorder.add_spans(SPANS)
    assert recorder.report.timeline is None


def test_what_is_added_for_later_is_there_when_somebody_looks() -> None:
    looked: list[str] = []

    def later() -> list[Span]:
        looked.append("")
        return SPANS[:1]

    found = Timeline()
    found.add_later(later)
    found.add(SPANS[1:])
    assert looked == []
    again = pickle.loads(pickle.dumps(found))
    assert found == again == copy.deepcopy(found)
    assert len(found.spans) == len(SPANS)
    assert set(found.spans) == set(SPANS)
    assert looked == [""]
