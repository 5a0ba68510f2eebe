"""Collects what a load does, from any thread, for the report and the bar."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

from pyint8.report.load_report import LoadReport
from pyint8.report.progress import ByteProgress
from pyint8.report.timeline import Span, Timeline

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()


class Recorder:
    """Fills a report and moves a bar; thread-safe. As a context manager it closes the bar.

    Args:
        progress: Whether to show a bar in bytes (see `ByteProgress`).
        timeline: Whether to note what is done when, in the report's `timeline`.

    Attributes:
        report: The report that it fills.
    """

    def __init__(self, progress: bool | None = False, *, timeline: bool = False) -> None:
        self.report = LoadReport(timeline=Timeline() if timeline else None)
        self._bar = ByteProgress(progress)
        self._lock = threading.Lock()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase, less the time of phases inside it."""
        start = time.perf_counter()
        before = self.report.total_seconds
        try:
            yield
        finally:
            nested = self.report.total_seconds - before
            end = time.perf_counter()
            self._add_seconds(name, end - start - nested)
            self._add_span(name, start, end)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Adds time that ends now to a phase."""
        end = time.perf_counter()
        self._add_seconds(phase, seconds)
        if seconds:
            self._add_span(phase, end - seconds, end)

    def _add_seconds(self, phase: str, seconds: float) -> None:
        with self._lock:
            self.report.seconds[phase] += seconds

    def waiting(self) -> AbstractContextManager[None]:
        """Python waits for bytes within the block."""
        return _NOTHING if self.report.timeline is None else self._noted("waiting")

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add_span(what, start, time.perf_counter())

    def _add_span(self, what: str, begin: float, end: float) -> None:
        if self.report.timeline is not None:
            name = threading.current_thread().name
            self.add_spans([Span("Python" if name == "MainThread" else f"Python, {name}", what, begin, end)])

    def add_spans(self, spans: Iterable[Span]) -> None:
        """Adds what was done when, by the clock of `time.perf_counter`."""
        if self.report.timeline is not None:
            with self._lock:
                self.report.timeline.add(spans)

    def add_spans_later(self, spans: Callable[[], Iterable[Span]]) -> None:
        """The same, of what is called for when somebody looks."""
        if self.report.timeline is not None:
            with self._lock:
                self.report.timeline.add_later(spans)

    def expect(self, nbytes: int) -> None:
        """Announces how many bytes of the checkpoint will land."""
        self._bar.start(nbytes)

    def landed(self, nbytes: int) -> None:
        """Adds bytes of the checkpoint that have arrived on their device."""
        with self._lock:
            self.report.checkpoint_bytes += nbytes
            self._bar.advance(nbytes)

    def count(self, kind: str) -> None:
        """Counts a parameter or buffer of a kind (see `LoadReport.tensors`)."""
        with self._lock:
            self.report.tensors[kind] += 1

    def count_quantizer(self, name: str) -> None:
        """Counts a weight by what quantized it (see `LoadReport.quantized_by`)."""
        with self._lock:
            self.report.quantized_by[name] += 1

    def set_engine(self, stats: Mapping[str, float]) -> None:
        """Takes the extension's statistics (see `LoadReport.engine`)."""
        self.report.engine = dict(stats)


_listening = threading.Lock()
_listeners: list[list[LoadReport]] = []


def _renew_lock() -> None:
    """In a forked child: the thread that had the lock is not there."""
    global _listening
    _listening = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def collected() -> Iterator[list[LoadReport]]:
    """Collects the reports of all loads that end while the block lasts, in any thread."""
    reports: list[LoadReport] = []
    try:
        try:
            with _listening:
                _listeners.append(reports)
            yield reports
        finally:
            _stop_collecting(reports)
    finally:  # again: Ctrl-C may have come in between
        _stop_collecting(reports)


def _stop_collecting(reports: list[LoadReport]) -> None:
    with _listening:
        _listeners[:] = [each for each in _listeners if each is not reports]


def announce(report: LoadReport, what: str) -> None:
    """Logs one line for a load that has ended, and passes its report to all collectors."""
    logger.info("loaded %s: %s", what, report.summary())
    with _listening:
        for reports in _listeners:
            reports.append(report)
