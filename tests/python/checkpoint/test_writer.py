"""Files are those of safetensors' own writer, to the byte; errors name the tensor."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from failing import failing
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pyint8.checkpoint import read_header
from pyint8.checkpoint.entry import CODES
from pyint8.checkpoint.writer import SafetensorsWriter, TensorPlan
from pyint8.errors import CheckpointError, WriteError

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.int64]


def plans_of(tensors: dict[str, torch.Tensor]) -> list[TensorPlan]:
    return [
        TensorPlan(name, CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], piece: int = 5) -> None:
    with SafetensorsWriter(str(path), plans_of(tensors), metadata) as writer:
        for name, tensor in reversed(tensors.items()):
            data = raw(tensor)
            writer.write(name, (data[at : at + piece] for at in range(0, len(data), piece)))


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.dictionaries(st.sampled_from(["format", "é"]), st.just("pt"), max_size=1),
)
def test_it_writes_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory,
    described: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str],
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    tensors = {name: (torch.rand(shape) * 100).to(dtype) for name, (dtype, shape) in described.items()}
    write(folder / "ours", tensors, metadata)
    save_file(tensors, folder / "theirs", metadata or None)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


TWO = [TensorPlan("a", "F32", (2, 3)), TensorPlan("b", "U8", (4,))]


@pytest.mark.parametrize(("size", "found"), [(3, "3 bytes instead of the 4"), (5, "more than the 4 bytes")])
def test_bytes_that_were_not_planned_are_refused(tmp_path: Path, size: int, found: str) -> None:
    with SafetensorsWriter(str(tmp_path / "file"), TWO, {}) as writer:
        writer.write("a", [bytes(24)])
        with pytest.raises(CheckpointError, match=found) as raised:
            writer.write("b", [bytes(size)])
        assert raised.value.tensor == "b"


def test_what_is_written_is_there_when_it_is_resumed(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    with SafetensorsWriter(path, TWO, {}) as writer:
        writer.write("a", [b"x" * 24])
        writer.sync()
    with SafetensorsWriter(path, TWO, {}, resume=True) as writer:
        writer.write("b", [b"yyyy"])
    entry = read_header(path).entries["a"]
    assert (tmp_path / "file").read_bytes()[entry.offset :] == b"x" * 24 + b"yyyy"


def test_a_refusal_of_the_system_names_tensor_and_file(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            SafetensorsWriter(path, [TensorPlan("big", "U8", (8192,))], {}) as writer,
            pytest.raises(WriteError, match="max_shard_size") as raised,
        ):
            writer.write("big", [bytes(8192)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (raised.value.tensor, raised.value.path, raised.value.errno) == ("big", path, errno.EFBIG)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SafetensorsWriter(str(tmp_path / "file"), TWO, {}) as writer:

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(WriteError, match="No space left on device; free some space") as raised:
            writer.write("a", [bytes(24)])
    assert (raised.value.tensor, raised.value.errno) == ("a", errno.ENOSPC)


def test_a_close_that_fails_is_said_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SafetensorsWriter(str(tmp_path / "w"), [TensorPlan("a", "I8", (1,))], {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", failing("close"))
        with pytest.raises(WriteError, match="Input/output error") as raised:
            writer.close()
    assert raised.value.path == str(tmp_path / "w")
    other = os.open(tmp_path / "w", os.O_RDONLY)  # gets the number that is free
    writer.close()
    os.close(other)
