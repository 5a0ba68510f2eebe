"""Loads from several threads of one process: each gives the model that it gives alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import compare_models, show
from zoo import ZOO, CheckpointStore

import pyint8

LOADS = 16


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    """Threads take turns so often that loads which may overlap do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_the_models_are_as_loaded_alone(checkpoints: CheckpointStore) -> None:
    model = ZOO["gpt2"]  # its head is tied, which is what from_pretrained switches off for the process
    folder = checkpoints.folder(model, "bf16")
    before = torch.get_default_dtype()
    alone = pyint8.load(folder, "cpu")
    try:
        with ThreadPoolExecutor(4) as threads:
            loaded = list(threads.map(lambda _: pyint8.load(folder, "cpu"), range(LOADS)))
        assert torch.get_default_dtype() == before
    finally:
        torch.set_default_dtype(before)
    for each in loaded:
        found = compare_models(each, alone)
        assert not found, show(found)
