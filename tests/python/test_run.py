"""`python -m pyint8.run PROGRAM`: the program runs as it would by itself, and its int8 loads are ours."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from zoo import ZOO, CheckpointStore

pytestmark = pytest.mark.slow

PROGRAM = """
    import os
    import sys
    import torch, transformers
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    print(sys.path.count("") + sys.path.count(os.getcwd()))
    print(__name__, sys.argv[1:], AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"].__module__)
    int8 = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=int8, device_map="cpu")
    print(type(model.hf_quantizer).__name__, model.is_loaded_in_8bit)
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_a_program_is_run(as_module: bool, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    folder = str(checkpoints.folder(ZOO["llama"], "bf16"))
    (tmp_path / "its_program.py").write_text(textwrap.dedent(PROGRAM))
    program = ["-m", "its_program"] if as_module else ["its_program.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pyint8.run", *program, folder, "--more"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    paths, first, second = done.stdout.splitlines()[-3:]
    assert paths == "1"  # once, and only because that is where the program is
    assert first == f"__main__ {[folder, '--more']} pyint8.models.transformers.hooks"
    assert second == "Bnb8BitHfQuantizer True"


@pytest.mark.parametrize("arguments", [[], ["-m"], ["-x", "y"]])
def test_run_says_how_it_is_used(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyint8.run", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python -m pyint8.run (PROGRAM | -m MODULE)")
