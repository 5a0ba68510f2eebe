"""The command line as a whole: help, exit codes, what goes to which stream, and what it imports."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.cli.main import VERBS, _parser, main
from pyint8.cli.verb import Verb

ROOT = next(path.parent for path in Path(__file__).resolve().parents if path.name == "tests")
HEAVY = {"torch", "transformers", "bitsandbytes", "numpy", "accelerate", "huggingface_hub"}
SAY_HEAVY = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", sorted({HEAVY} & set(sys.modules)), file=sys.stderr))
"""

Command = Callable[..., Any]


@pytest.fixture
def llama(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama"], "bf16")


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_has_examples_that_parse(verb: Verb, command: Command) -> None:
    done = command(verb.name, "--help", before=SAY_HEAVY, afresh=True)
    assert done.returncode == 0
    assert "heavy: []" in done.stderr
    assert verb.examples
    for example in verb.examples:
        assert example in done.stdout
        words = shlex.split(re.split(r" [|&]", example)[0])
        own = words.index("pyint8")  # behind a launcher, where there is one
        assert own == 0 or words[0] == "torchrun"
        assert _parser().parse_args(words[own + 1 :]).verb is verb


def test_help_names_all_verbs(command: Command) -> None:
    done = command("--help", before=SAY_HEAVY, afresh=True)
    assert done.returncode == 0
    assert "heavy: []" in done.stderr
    assert all(verb.name in done.stdout and verb.summary.split()[0] in done.stdout for verb in VERBS)


def test_the_version(command: Command) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"pyint8 {pyint8.__version__}\n")


def test_a_verb_is_a_file_of_its_name() -> None:
    folder = Path(sys.modules[main.__module__].__file__ or "").parent
    assert all((folder / f"{verb.name}.py").exists() for verb in VERBS)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="the tests are apart from their tree")
def test_the_console_script_is_the_same_program() -> None:
    (target,) = re.findall(r'^pyint8 = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert EntryPoint("pyint8", target, "console_scripts").load() is main


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["inspect"],
        ["plan", "path", "--max-memory", "20GiB"],
        ["convert", "source"],
        ["load", "path", "--tokens", "many"],
        ["load", "path", "--tokens", "4"],
        ["convert", "source", "folder", "--private"],
        ["run"],
        ["run", "-m"],
        ["run", "-x", "y"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments: list[str], command: Command) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: pyint8")


@pytest.mark.parametrize(
    ("verb", "as_json"), [("inspect", False), ("inspect", True), ("plan", True), ("load", True), ("convert", True)]
)
def test_an_error_is_one_line_and_1(verb: str, as_json: bool, command: Command, copy_of: Command) -> None:
    file = copy_of("llama") / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 5)
    done = command(verb, file.parent, *(["there"] if verb == "convert" else []), *(["--json"] if as_json else []))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = (line for line in done.stderr.splitlines() if str(file) in line)
    assert line.startswith(f"pyint8 {verb}: ")
    assert "Traceback" not in done.stderr


def test_a_bad_value_is_said_in_one_line(llama: Path, command: Command) -> None:
    done = command("load", llama, "--dtype", "float33")
    assert done.returncode == 1
    assert "dtype is 'float33'" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_130(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    words = [sys.executable, "-m", "pyint8", "run", "waits.py"]
    with subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "pyint8 run: interrupted"
    assert "Traceback" not in said


def test_a_reader_that_has_enough_is_no_error(llama: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pyint8", "inspect", str(llama), "--headers", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


# --- streams and imports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["inspect", "plan", "load"])
def test_json_is_all_there_is_on_standard_output(verb: str, llama: Path, command: Command) -> None:
    """Whatever else prints there: Python code, or C code."""
    prints = "import atexit, os, pyint8.cli.main as m\n" + (
        "plain = m.Output\n"
        "def noisy(*a, **k):\n    print('from Python'); os.write(1, b'from C\\n'); return plain(*a, **k)\n"
        "m.Output = noisy"
    )
    done = command(verb, llama, "--json", before=prints)
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), dict)
    assert "from Python" in done.stderr
    assert "from C" in done.stderr


def test_headers_import_nothing_heavy(llama: Path, command: Command) -> None:
    done = command("inspect", llama, "--headers", before=SAY_HEAVY, afresh=True)
    assert done.returncode == 0
    assert done.stderr == "heavy: []\n"
