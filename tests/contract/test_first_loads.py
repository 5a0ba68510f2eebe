"""The first loads of a process, from several threads that begin at once."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.host import garbage
from pyint8.host.imports import imported

pytestmark = pytest.mark.slow

# How many fresh processes; each imports torch and transformers.
PROCESSES = int(os.environ.get("PYINT8_TEST_FIRST_LOADS", "3"))

SCRIPT = """
import sys, threading
import pyint8
from torch_free import check
sys.setswitchinterval(1e-5)
folder, threads, errors, models = sys.argv[1], 4, [], []
begin = threading.Barrier(threads)
def load():
    begin.wait()
    try:
        models.append(pyint8.load(folder, "cpu"))
    except BaseException as error:
        errors.append(f"{type(error).__name__}: {error}")
workers = [threading.Thread(target=load) for _ in range(threads)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
same = {str(sorted((name, float(value.float().sum())) for name, value in m.state_dict().items())) for m in models}
print(len(models), len(same), *errors)
"""


@pytest.mark.parametrize("number", range(PROCESSES))
def test_every_thread_of_a_fresh_process_loads(number: int, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "torch_free.py").write_text("import sys\ncheck = None\nassert 'torch' not in sys.modules\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(pyint8.__file__).parents[1])}
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(folder)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "4 1", done.stdout + done.stderr[-2000:]


def test_a_module_that_is_being_imported_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    half = types.ModuleType("torch")
    half.__spec__ = types.SimpleNamespace(_initializing=True)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torch", half)
    assert imported("torch") is None
    garbage.collect_if_short(1)  # asks whether a GPU is in use
    half.__spec__ = types.SimpleNamespace(_initializing=False)  # type: ignore[assignment]
    assert imported("torch") is half
    assert imported("no.such.module") is None
    assert imported("types") is types
