"""What a load tells: its report, the recorder that fills it, and a bar in bytes."""

from pyint8.report.load_report import LoadReport, Tally, readable_size
from pyint8.report.recorder import Recorder, announce, collected

__all__ = ["LoadReport", "Recorder", "Tally", "announce", "collected", "readable_size"]
