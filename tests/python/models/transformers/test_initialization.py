"""Models are built without drawing values that lie nowhere, and only while they are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import OptionError
from pyint8.models.transformers.initialization import NoInitializationOnMeta
from pyint8.quantizer import Int8Quantizer


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def initialize(device: str) -> list[str]:
    with Operators() as operators, torch.device(device):
        nn.Linear(3, 4)
        nn.Embedding(3, 4)
        nn.init.trunc_normal_(torch.empty(4))
        nn.init.constant_(nn.Parameter(torch.empty(4)), 2.0)
        torch.empty(4).normal_()
    return [name for name in operators.names if "empty" not in name and "detach" not in name]


def test_nothing_is_drawn_on_meta():
    assert initialize("meta")
    with NoInitializationOnMeta():
        assert initialize("meta") == []


def test_what_is_real_is_initialized_as_ever():
    torch.manual_seed(0)
    expected = nn.Linear(3, 4).weight
    torch.manual_seed(0)
    with NoInitializationOnMeta():
        nn.Linear(30, 4, device="meta")
        found = nn.Linear(3, 4).weight
        filled = nn.init.constant_(torch.empty(2), 3.0)
    assert torch.equal(found, expected)
    assert filled.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("fails", [False, True])
def test_no_mode_outlives_a_load(checkpoints: CheckpointStore, tmp_path: Path, fails: bool) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    if fails:
        with pytest.raises(OptionError):
            pyint8.load(folder, "cpu", no_such_argument=1)
    else:
        pyint8.load(folder, "cpu")
    assert torch.overrides._get_current_function_mode_stack() == []
    assert _python_dispatch._get_current_dispatch_mode() is None


def test_parameters_are_made_without_it(checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    create = Int8Quantizer.create_quantized_param

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        modes.append(_get_current_function_mode())
        return create(*args, **kwargs)

    monkeypatch.setattr(Int8Quantizer, "create_quantized_param", note)
    pyint8.load(checkpoints.folder(ZOO["gpt2"], "bf16"), device_map="cpu")
    assert len(modes) > 1
    assert set(modes) == {None}
