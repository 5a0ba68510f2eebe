"""Loads that are cut short, by a file that changes or by Ctrl-C: a typed error, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import errors
from pyint8.checkpoint import read_header
from pyint8.report.progress import ByteProgress
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

pytestmark = pytest.mark.usefixtures("nothing_left")

FILE = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Copy = Callable[..., Path]


def test_a_file_cut_while_it_is_loaded(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("llama")
    entry = read_header(folder / FILE).entries[Q_PROJ]
    monkeypatch.setattr(ByteProgress, "start", lambda *_: os.truncate(folder / FILE, entry.offset + 11))
    with pytest.raises(errors.FileChangedError, match="changed while it was loaded; load it again") as caught:
        pyint8.load(folder, "cpu")
    assert caught.value.path == entry.path


def test_a_file_cut_while_it_is_streamed(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("llama")
    entry = read_header(folder / FILE).entries[Q_PROJ]
    size = (folder / FILE).stat().st_size
    stream, opened = TensorStream.__init__, Transport.file

    def cut(*args: Any) -> int:
        number = opened(*args)
        os.truncate(folder / FILE, entry.offset + 11)
        return number

    def begin(*args: Any, **kwargs: Any) -> None:
        stream(*args, **kwargs)
        time.sleep(0.5)  # the workers have come to the end
        os.truncate(folder / FILE, size)  # so that transformers, which looks at the header, does not mind

    monkeypatch.setattr(Transport, "file", cut)
    monkeypatch.setattr(TensorStream, "__init__", begin)
    with pytest.raises(errors.FileChangedError, match="changed while it was loaded; load it again") as caught:
        pyint8.load(folder, "cpu")
    assert (caught.value.tensor, caught.value.path) == (Q_PROJ, entry.path)
    assert caught.value.offset == entry.offset + 11


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_between_tensors(name: str, checkpoints: CheckpointStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu")


def test_control_c_while_workers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is a hole of 1 GiB in a file: seconds of reading and quantizing."""
    header = json.dumps({"0.weight": {"dtype": "F32", "shape": [1 << 14, 1 << 14], "data_offsets": [0, 1 << 30]}})
    path = tmp_path / "hole.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(path, 8 + len(header) + (1 << 30))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1 << 14, 1 << 14, bias=False))
    sent: list[float] = []

    def interrupt_soon(*_: object) -> None:
        def interrupt() -> None:
            time.sleep(0.1)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()

    monkeypatch.setattr(ByteProgress, "start", interrupt_soon)
    with pytest.raises(KeyboardInterrupt):
        pyint8.load(path, "cpu", model=module, config=pyint8.Int8Config(skip_modules=[]))
    assert time.monotonic() - sent[0] < 2
