"""What a load reports: its figures, the recorder that collects them, and a bar in bytes."""

from pyint8.report.load_report import LoadReport, Tally, readable_size, skipped_by_reason
from pyint8.report.recorder import Recorder, announce, collected
from pyint8.report.timeline import Span, Timeline

__all__ = [
    "LoadReport",
    "Recorder",
    "Span",
    "Tally",
    "Timeline",
    "announce",
    "collected",
    "readable_size",
    "skipped_by_reason",
]
