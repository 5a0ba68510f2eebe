"""The one door through which files are opened: nothing that is no file keeps a load waiting."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

import pytest
import torch
from torch import nn

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import FileChangedError, Pyint8Error, ReadError
from pyint8.host.files import _RegularFile, exists, is_file, is_folder, open_file, require_files
from pyint8.host.page_cache import cold_steps
from pyint8.streaming.extension import _core

pytestmark = pytest.mark.usefixtures("nothing_left", "at_once")
Copy = Callable[..., Path]
PACKAGE = Path(pyint8.__file__).parent


@pytest.fixture
def at_once() -> Iterator[None]:
    """Fails a test that waits for what never comes."""

    def fail(*_: object) -> None:
        raise TimeoutError("it waited")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def become_a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_a_file_is_opened_as_ever(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    os.symlink(tmp_path / "file", tmp_path / "link")
    for name in ("file", "link"):
        with open_file(tmp_path / name) as file:
            assert os.get_blocking(file.fileno())
            assert not os.get_inheritable(file.fileno())
            assert file.read() == b"text"


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "link to a pipe"])
def test_anything_else_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"no file; put the file itself there|No such device or address"):
        open_file(path)


def names_a_way_to_open(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in ("os.open", "io.open", "os.fdopen")
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
        return not any(set("wx") & set(ast.unparse(mode)) for mode in node.args[1:])
    return isinstance(node, ast.Name) and node.id == "FileIO"


def test_no_other_code_opens_files() -> None:
    files = {path: ast.walk(ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))}
    found = [str(path.relative_to(PACKAGE)) for path, nodes in files.items() if any(map(names_a_way_to_open, nodes))]
    assert found == ["host/files.py", "host/locks.py", "host/writing.py"]


# What they ask for is of no checkpoint, or may as well not be there.
_ASKED = {"operations/bench.py", "operations/machine.py", "run.py"}


def test_no_other_code_takes_a_failing_disk_for_an_absent_file() -> None:
    asks = re.compile(r"os\.path\.(l?exists|isfile|isdir)\b(?!`)")
    texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {path for path, text in texts.items() if asks.search(text)} == _ASKED


# A command for people; what killed processes have left, which goes where it is seen; and what tries again.
_TAKE_FOR_EMPTY = {"checkpoint/advice.py", "checkpoint/replacement.py", "host/removal.py"}


def test_no_other_code_takes_a_failing_disk_for_an_empty_folder() -> None:
    asks = re.compile(r"\b[ir]?glob\(|os\.walk\((?!.*onerror)|ignore_errors")
    texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {path for path, text in texts.items() if asks.search(text)} == _TAKE_FOR_EMPTY


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    found = {name: (exists(tmp_path / name), is_file(tmp_path / name)) for name in ("file", "gone", "round", "file/in")}
    assert found == {"file": (True, True), "gone": (False, False), "round": (False, False), "file/in": (False, False)}
    assert is_folder(tmp_path)
    assert exists(tmp_path / "gone", follow=False)
    assert not any((exists("a\0b"), is_file("x" * 5000), is_folder(tmp_path / "file")))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM])
def test_what_cannot_be_told(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "stat", fail)
    for ask in (exists, is_file, is_folder):
        with pytest.raises(ReadError, match="cannot be looked at") as caught:
            ask("/model")
        assert (caught.value.errno, caught.value.path) == (code, "/model")


def test_a_read_that_would_block_is_an_error() -> None:
    """As of a file that another program has locked; Python's own gives None."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with BufferedReader(_RegularFile(reading)) as file:
        for read in (file.raw.readall, lambda: file.raw.readinto(bytearray(1)), file.read, lambda: file.read(1)):
            with pytest.raises(BlockingIOError):
                read()
    os.close(writing)


def test_a_folder_may_have_pipes_that_nobody_opens(tmp_path: Path) -> None:
    become_a_pipe(tmp_path / "training.sock")
    (tmp_path / "runs.bin").mkdir()
    (tmp_path / "gone.json").symlink_to("nowhere")
    require_files(str(tmp_path))


NAMES = ["model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "own.py"]


@pytest.mark.parametrize("name", [*NAMES, "adapter_config.json", "pytorch_model.bin"])
@pytest.mark.parametrize("subfolder", ["", "inside"])
def test_a_load_of_pipes_ends(name: str, subfolder: str, copy_of: Copy) -> None:
    folder = copy_of("llama")
    if subfolder:
        files = list(folder.iterdir())
        (folder / subfolder).mkdir()
        for path in files:
            path.rename(folder / subfolder / path.name)
    become_a_pipe(folder / subfolder / name)
    with pytest.raises(ReadError, match="a named pipe and no file") as caught:
        pyint8.load(folder, "cpu", subfolder=subfolder)
    assert caught.value.path == str(folder / subfolder / name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x", "x.ckpt", "x.index.json"])
def test_a_pipe_alone_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    become_a_pipe(tmp_path / name)
    with pytest.raises(Pyint8Error):
        open_checkpoint(tmp_path / name)
    with pytest.raises(Pyint8Error):
        pyint8.load(tmp_path / name, "cpu", model=nn.Linear(2, 2))


def test_a_shard_that_an_index_names_may_be_one(tmp_path: Path) -> None:
    become_a_pipe(tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "shard.safetensors"}}')
    with pytest.raises(ReadError, match="a named pipe"):
        open_checkpoint(tmp_path)


def test_the_page_cache_is_not_asked_about_one(tmp_path: Path) -> None:
    become_a_pipe(tmp_path / "x")
    with pytest.raises(ReadError, match="a named pipe"):
        list(cold_steps(str(tmp_path / "x"), 4096))


def test_one_that_is_swapped_in_while_loading(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("llama")
    monkeypatch.setattr("pyint8.streaming.prefetch.cold_steps", lambda *_: [])

    def swap(*_: object, **__: object) -> None:
        become_a_pipe(folder / "model.safetensors")

    monkeypatch.setattr("pyint8.report.progress.ByteProgress.start", swap)
    with pytest.raises((FileChangedError, ReadError)):
        pyint8.load(folder, "cpu", dtype=torch.float16)


def test_the_engine_refuses_it(tmp_path: Path) -> None:
    become_a_pipe(tmp_path / "x")
    engine = _core.Engine(threads=1, slots_per_thread=1, slot_bytes=8192, direct_io=False)
    try:
        with pytest.raises(ReadError, match="this is no file, but a folder, a pipe or a device"):
            engine.add_file(os.fsencode(tmp_path / "x"))
    finally:
        engine.close()
