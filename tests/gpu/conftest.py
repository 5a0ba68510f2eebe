"""Tests that need a CUDA device: skipped without one, unless one is promised (PYINT8_REQUIRE_GPU=1).

`--results FILE` writes what became of each, and on which machine, as JSON.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

_PACKAGES = ("pyint8", "torch", "transformers", "bitsandbytes", "accelerate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write outcomes and the machine's data to this file, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--results"):
        config.pluginmanager.register(_Results(config.getoption("--results")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.gpu)
    if torch.cuda.is_available():
        return
    if os.environ.get("PYINT8_REQUIRE_GPU") == "1":
        pytest.exit("PYINT8_REQUIRE_GPU=1, and torch finds no CUDA device", returncode=1)
    for item in items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))


class _Results:
    """Notes the outcome and the seconds of every test."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            skipped = isinstance(report.longrepr, tuple)  # path, line, reason
            test["reason"] = report.longrepr[2] if skipped else str(report.longrepr)[-2000:]

    def pytest_sessionfinish(self) -> None:
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        counts = Counter(test["outcome"] for test in self._tests.values())
        machine = {"gpus": gpus, "packages": {name: metadata.version(name) for name in _PACKAGES}}
        results = {"machine": machine, "counts": counts, "tests": self._tests}
        self._path.write_text(json.dumps(results, indent=1) + "\n")
