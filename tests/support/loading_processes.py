"""What processes of a pool do, in a module that they can import however they begin."""

from __future__ import annotations

import torch
from torch import nn

import pyint8


def load_small(path: str) -> list[str]:
    config = pyint8.Int8Config(skip_modules=[])
    module = pyint8.load(path, "cpu", model=nn.Sequential(nn.Linear(64, 64)), config=config)
    return [str(parameter.dtype) for parameter in module.parameters()]


class Loading(torch.utils.data.Dataset[int]):
    """Each item loads a model, in whatever process asks for it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int) -> int:
        return len(load_small(self._path))
