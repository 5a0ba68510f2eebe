"""Tests that need a CUDA device: skipped without one, unless one is promised (PYINT8_REQUIRE_GPU=1)."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.gpu)
    if torch.cuda.is_available():
        return
    if os.environ.get("PYINT8_REQUIRE_GPU") == "1":
        pytest.exit("PYINT8_REQUIRE_GPU=1, and torch finds no CUDA device", returncode=1)
    for item in items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
