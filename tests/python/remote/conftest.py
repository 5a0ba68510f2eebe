"""A server of a small checkpoint, and options that do not wait long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from range_server import RangeServer, serving
from safetensors.torch import save_file

IMPATIENT = {"client_options": {"read_timeout": "300ms", "timeout": "1s"}}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(700, 300), "b": torch.randn(17), "c": torch.randn(3, 5).half(), "empty": torch.empty(0)}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    pytest.importorskip("obstore")
    made = tmp_path / "served"
    made.mkdir()
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text('{"model_type": "llama"}')
    return made


@pytest.fixture
def server(folder: Path) -> Iterator[RangeServer]:
    with serving(folder) as served:
        yield served


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.remote.store._FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def impatient() -> dict[str, Any]:
    return IMPATIENT
