"""A folder is replaced whole or not at all, whatever interrupts it; files that are not of a save stay."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from failing import failing

from pyint8.checkpoint import replacement
from pyint8.checkpoint.replacement import replaced_folder
from pyint8.checkpoint.side_files import carry_side_files, is_of_a_save
from pyint8.errors import OptionError, WriteError


def put(folder: Path | str, **files: str) -> None:
    for name, text in files.items():
        path = Path(folder, name.replace("__", "/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def interrupted(error: BaseException | type[BaseException]) -> str:
    raise error


def is_old(name: str) -> bool:
    return name.startswith("w")


def test_a_new_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with replaced_folder(str(target), is_old) as staging:
        put(staging, w1="new")
        assert not target.exists()
    assert read(target) == {"w1": "new"}
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask
    assert os.listdir(target.parent) == ["b"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_old_folder_is_replaced_but_for_what_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(replacement, "_exchanged", lambda *_: False)
    target = tmp_path / "model"
    put(target, w1="old", w2="old", notes="mine", logs__one="mine")
    os.symlink("notes", target / "link")
    target.chmod(0o750)
    with replaced_folder(str(target), is_old) as staging:
        put(staging, w1="new")
        assert read(target)["w1"] == "old"
    assert read(target) == {"w1": "new", "notes": "mine", "logs/one": "mine", "link": "mine"}
    assert os.readlink(target / "link") == "notes"
    assert target.stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    put(tmp_path / "real", w1="old")
    (tmp_path / "link").symlink_to("real")
    with replaced_folder(str(tmp_path / "link"), is_old) as staging:
        put(staging, w1="new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == {"w1": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupt_leaves_the_old_one(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    put(tmp_path / "model", w1="old")
    expected = WriteError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), replaced_folder(str(tmp_path / "model"), is_old) as staging:
        put(staging, w1=interrupted(error))
    assert read(tmp_path) == {"model/w1": "old"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    put(tmp_path, file="text")
    with pytest.raises(OptionError, match="is a file"), replaced_folder(str(tmp_path / "file"), is_old):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    put(tmp_path, file="text")
    with (
        pytest.raises(WriteError, match="a file is in the way") as raised,
        replaced_folder(str(tmp_path / "file" / "model"), is_old),
    ):
        pass
    assert raised.value.path == str(tmp_path / "file")


@pytest.mark.parametrize("name", ["fstat", "close"])
def test_what_was_replaced_goes_though_the_system_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put(tmp_path / "model", w1="old", notes="mine")
    with monkeypatch.context() as patch, replaced_folder(str(tmp_path / "model"), is_old) as staging:
        put(staging, w1="new")
        patch.setattr(replacement, "discard_folder", with_failing(patch, name, 1))
    assert read(tmp_path) == {"model/w1": "new", "model/notes": "mine"}
    assert os.listdir(tmp_path) == ["model"]


def with_failing(patch: pytest.MonkeyPatch, name: str, nth: int) -> Callable[[str], None]:
    """The removal, within which a call of the system fails."""
    discard = replacement.discard_folder

    def call(folder: str) -> None:
        patch.setattr(os, name, failing(name, nth))
        discard(folder)

    return call


def test_what_cannot_be_removed_is_named_and_goes_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "model", w1="old")
    caplog.set_level(logging.WARNING, "pyint8")
    with monkeypatch.context() as patch, replaced_folder(str(tmp_path / "model"), is_old) as staging:
        put(staging, w1="new")
        patch.setattr(replacement, "discard_folder", with_failing(patch, "rmdir", 0))
    (message,) = caplog.messages
    assert message.startswith(f"{staging} is not needed any more, but could not be removed")
    assert read(tmp_path / "model") == {"w1": "new"}
    with replaced_folder(str(tmp_path / "model"), is_old) as staging:
        put(staging, w1="newer")
    assert os.listdir(tmp_path) == ["model"]


def test_files_of_which_nobody_knows_whether_they_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be looked into is not one without files."""
    put(tmp_path / "model", w1="old")
    monkeypatch.setattr(os, "scandir", failing("scandir", 1, lambda path: str(path).endswith("/logs")))
    with (
        pytest.raises(WriteError, match="Input/output error"),
        replaced_folder(str(tmp_path / "model"), is_old) as staging,
    ):
        put(staging, logs__one="new")
    assert read(tmp_path) == {"model/w1": "old"}


def test_a_folder_that_cannot_be_locked_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = str(tmp_path / "model")
    monkeypatch.setattr("fcntl.flock", lambda *_: interrupted(OSError(errno.ENOLCK, "No locks available")))
    for is_resumed in (None, lambda _: True):
        with pytest.raises(WriteError), replaced_folder(target, is_old, is_resumed=is_resumed):
            pass
        assert os.listdir(tmp_path) == []


SAVER = """
import os, sys
from pyint8.checkpoint.replacement import replaced_folder
folder, generation = sys.argv[1], 1
while True:
    with replaced_folder(folder, lambda name: name.startswith("w")) as staging:
        for number in range(5):
            with open(os.path.join(staging, f"w{number}"), "w") as file:
                file.write(str(generation) * 100_000)
        if generation == 1:
            print("begun", flush=True)
    generation = 3 - generation
"""


def test_a_process_that_is_killed_leaves_one_or_the_other(tmp_path: Path) -> None:
    target = tmp_path / "model"
    drawn = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(drawn.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if target.exists():
            texts = read(target)
            assert sorted(texts) == [f"w{number}" for number in range(5)]
            assert len(set(texts.values())) == 1
            assert {len(text) for text in texts.values()} == {100_000}
    with replaced_folder(str(target), is_old) as staging:
        beside = [name for name in os.listdir(tmp_path) if name != "model"]
        assert beside == [os.path.basename(staging)]  # what the others left is gone
    assert os.listdir(tmp_path) == ["model"]


def test_a_save_that_is_under_way_is_no_leftover(tmp_path: Path) -> None:
    target = str(tmp_path / "model")
    with replaced_folder(target, is_old) as one:
        put(one, w1="one")
        with replaced_folder(target, is_old) as other:
            put(other, w1="other")
        assert os.path.isdir(one)
    assert read(tmp_path / "model") == {"w1": "one"}


def test_side_files_are_carried_and_weights_are_not(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    put(source, **{"tokenizer.json": "t", "config.json": "c", "README.md": "r", "LICENSE": "l", ".gitattributes": "g"})
    put(source, **{"model.safetensors": "w", "pytorch_model.bin": "w", "model.safetensors.index.json": "i"})
    put(source, **{"templates__chat.jinja": "j", "onnx__model.onnx": "w", "onnx__config.json": "c", "deep__er__x": "x"})
    put(folder, **{"tokenizer.json": "kept"})
    carry_side_files(str(source), str(folder))
    assert read(folder) == {"tokenizer.json": "kept", "LICENSE": "l", "templates/chat.jinja": "j"}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("model.fp16.safetensors", False),
        ("pytorch_model.bin", False),
        ("tokenizer.json", False),
    ],
)
def test_only_what_a_save_writes_is_replaced(name: str, ours: bool) -> None:
    assert is_of_a_save(name) == ours
