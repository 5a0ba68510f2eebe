"""What was done when: by each worker, bus and GPU, and by Python; as data, a picture, or a trace for Perfetto."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pyint8.errors import MissingDependencyError, OptionError

_PICTURES = (".png", ".svg", ".pdf")
_COLORS = {
    "reading": "#1b7837",
    "copying": "#2166ac",
    "quantizing": "#b2182b",
    "waiting": "#d9d9d9",
    "read headers": "#fdb863",
    "build": "#b2abd2",
    "stream": "#e6e6f5",
    "finish": "#8073ac",
}
_LANE_INCHES = 0.28


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that was done.

    Attributes:
        lane: By whom: "worker 3", "bus to cuda:0", "cuda:0", or "Python", for other threads with their name.
        what: "reading", "copying", "quantizing", "waiting" (a worker for a slot, Python for bytes), or a phase of the
            load.
        begin: In seconds, of `time.perf_counter`.
        end: The same.
        nbytes: That it was about; 0 where it was not about bytes.
    """

    lane: str
    what: str
    begin: float
    end: float
    nbytes: int = 0


class Timeline:
    """The spans of one load (see `LoadReport.timeline`).

    Args:
        spans: In no order.
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans = list(spans)
        self._later: list[Callable[[], Iterable[Span]]] = []

    @property
    def spans(self) -> list[Span]:
        """In no order."""
        while self._later:
            self._spans.extend(self._later.pop()())
        return self._spans

    def add(self, spans: Iterable[Span]) -> None:
        self._spans.extend(spans)

    def add_later(self, spans: Callable[[], Iterable[Span]]) -> None:
        """Adds what is called for when somebody looks, so that a load need not wait for thousands of them."""
        self._later.append(spans)

    def __getstate__(self) -> dict[str, Any]:
        return {"_spans": self.spans, "_later": []}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Timeline) and self.spans == other.spans

    __hash__ = None  # type: ignore[assignment]

    @property
    def start(self) -> float:
        """When the first span began."""
        return min((span.begin for span in self.spans), default=0.0)

    def lanes(self) -> dict[str, list[Span]]:
        """The spans of each lane in order: Python first, then workers, buses and GPUs."""
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: (_lane_order(span.lane), span.begin, -span.end)):
            found.setdefault(span.lane, []).append(span)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: for each lane a list of [what, begin, end, bytes], in seconds since the start."""
        start = self.start
        return {
            lane: [[span.what, span.begin - start, span.end - start, span.nbytes] for span in spans]
            for lane, spans in self.lanes().items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture (.png, .svg or .pdf, by matplotlib), or with .json a trace for ui.perfetto.dev.

        Raises:
            OptionError: The name ends in none of these.
            MissingDependencyError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        require_drawable(path)
        if _extension(path) == ".json":
            with open(path, "w", encoding="utf-8") as file:
                json.dump(self._trace(), file)
        else:
            self._draw(path)

    def _trace(self) -> dict[str, Any]:
        """In Chrome's trace event format, whose times are microseconds."""
        events: list[dict[str, Any]] = []
        start = self.start
        for number, (lane, spans) in enumerate(self.lanes().items()):
            events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}})
            events.append(
                {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": number, "args": {"sort_index": number}}
            )
            events += [
                {
                    "ph": "X",
                    "name": span.what,
                    "pid": 1,
                    "tid": number,
                    "ts": (span.begin - start) * 1e6,
                    "dur": (span.end - span.begin) * 1e6,
                    "args": {"bytes": span.nbytes},
                }
                for span in spans
            ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def _draw(self, path: str | os.PathLike[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        lanes = self.lanes()
        figure = Figure(figsize=(12, 1.2 + _LANE_INCHES * len(lanes)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for row, spans in enumerate(lanes.values()):
            pieces = [((span.begin - self.start) * 1e3, (span.end - span.begin) * 1e3) for span in spans]
            axes.broken_barh(pieces, (row - 0.4, 0.8), facecolors=[_color(span.what) for span in spans])
        axes.set_yticks(range(len(lanes)), lanes)
        axes.set_ylim(max(1, len(lanes)) - 0.5, -0.5)
        axes.set_xlabel("milliseconds")
        kinds = dict.fromkeys(span.what for spans in lanes.values() for span in spans)
        handles = [Patch(color=_color(kind), label=kind) for kind in kinds]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(kinds) or 1, frameon=False)
        figure.savefig(path, dpi=150)


def require_drawable(path: str | os.PathLike[str]) -> None:
    """Raises OptionError for a name that `Timeline.save` does not take, MissingDependencyError without matplotlib."""
    extension = _extension(path)
    if extension not in (*_PICTURES, ".json"):
        raise OptionError(f"{os.fspath(path)} ends in no {', '.join(_PICTURES)} or .json; name it so")
    if extension != ".json" and find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "a picture of a load needs matplotlib: `pip install matplotlib`, or save it as .json and open that in "
            "https://ui.perfetto.dev"
        )


def _extension(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(os.fspath(path))[1].lower()


def _lane_order(lane: str) -> tuple[int, list[int], str]:
    """Python, workers by number, then buses and GPUs."""
    kinds = ("Python", "worker", "bus", "cuda")
    kind = next((number for number, kind in enumerate(kinds) if lane.startswith(kind)), len(kinds))
    return kind, [int(number) for number in re.findall(r"\d+", lane)], lane


def _color(what: str) -> str:
    return _COLORS.get(what, "#737373")
