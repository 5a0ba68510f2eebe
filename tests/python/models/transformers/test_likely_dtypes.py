"""In which dtypes a load is likely to have a model, and that transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.likely_dtypes import likely_dtypes
from pyint8.streaming.guesses import Guess
from pyint8.streaming.preparation import Preparation

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def request_of(tmp_path: Path) -> Any:
    """Of a load of a folder with this configuration."""

    def write(config: Any, **arguments: Any) -> LoadRequest:
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp_path / "config.json").write_text(text)
        return LoadRequest(path=str(tmp_path), base=str(tmp_path), arguments=arguments)

    return write


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        (F16, [F16]),
        (F32, [F32]),
        ({"": BF16}, [BF16, BF16]),
        ({"": BF16, "text_config": F32}, [BF16, BF16, F32]),
        ({"text_config": BF16}, [F32, BF16]),  # the whole is in torch's default dtype
    ],
    ids=str,
)
def test_what_is_asked_for_counts(dtype: Any, found: list[torch.dtype], request_of: Any) -> None:
    assert likely_dtypes(dtype, {}, request_of({"dtype": "float64"})) == found


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"dtype": "float32"}, [F32]),
        ({"torch_dtype": "float16"}, [F16]),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, [BF16]),
        ({"dtype": None, "torch_dtype": "float16"}, [F16]),
        ({"dtype": "bfloat16", "text_config": {"torch_dtype": "float32"}, "vision_config": {}}, [BF16, F32]),
        ({"dtype": "bfloat16", "thinker_config": {"text_config": {"dtype": "float32"}}}, [BF16, F32]),
        ({"dtype": "bfloat16", "vocabulary": {"dtype": 7, "a": [{"dtype": "float32"}]}}, [BF16]),
        ({"text_config": {"dtype": "float16"}}, [BF16, F16]),  # transformers looks at the weights
        ({}, [BF16]),
        ({"dtype": "bf16"}, []),
        ({"dtype": "nn"}, []),
        ({"dtype": {"": "bfloat16"}}, []),
        ("{", []),
        ("[]", []),
        ("\0" * 100, []),
        ('{"a":' * 100_000, []),
        (None, []),
    ],
    ids=lambda value: str(value)[:60],
)
def test_auto_is_what_the_configuration_says(
    config: Any, found: list[torch.dtype], request_of: Any, tmp_path: Path
) -> None:
    save_file({"a": torch.zeros(1, dtype=BF16), "b": torch.zeros(1, dtype=torch.int64)}, tmp_path / "model.safetensors")
    assert likely_dtypes("auto", open_checkpoint(tmp_path), request_of(config)) == found


def test_weights_of_two_dtypes_say_nothing(request_of: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1, dtype=BF16), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert likely_dtypes("auto", open_checkpoint(tmp_path), request_of({})) == []
    assert likely_dtypes("auto", open_checkpoint(tmp_path), request_of({"dtype": "float16"})) == [F16]


def test_the_configuration_of_a_subfolder(request_of: Any, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text('{"dtype": "float16"}')
    assert likely_dtypes("auto", {}, request_of({"dtype": "float32"}, subfolder="inner")) == [F16]
    assert likely_dtypes("auto", {}, request_of({"dtype": "float32"}, subfolder="other")) == []


def test_no_folder_and_nothing_in_the_cache() -> None:
    assert likely_dtypes("auto", {}, LoadRequest(path="no/such", base="no/such")) == []


@pytest.mark.parametrize(
    ("dtype", "configured", "found"),
    [
        ("auto", "bfloat16", (BF16, True)),
        ("auto", "float32", (F32, False)),
        ("auto", None, (BF16, True)),
        (None, "float32", (F16, True)),
        ({"": BF16, "text_config": F32}, "bfloat16", (BF16, False)),
        (F32, "bfloat16", (F32, False)),
    ],
    ids=str,
)
def test_loads_guess_the_dtype_they_come_to(
    dtype: Any,
    configured: str | None,
    found: tuple[torch.dtype, bool],
    checkpoints: CheckpointStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Guess] = []
    monkeypatch.setattr(Preparation, "start_head_start", lambda _, device_map, budget, guess: given.append(guess))
    source = checkpoints.folder(ZOO["llama"], "bf16")
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": configured}))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    model = pyint8.load(tmp_path, "cpu", dtype=dtype, progress=False)
    assert [(guess.dtype, guess.is_16_bit) for guess in given] == [found]
    assert model.dtype == found[0]


def test_code_of_a_checkpoint_is_not_guessed_at(
    checkpoints: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Guess | None] = []
    monkeypatch.setattr(Preparation, "start_head_start", lambda _, device_map, budget, guess: given.append(guess))
    for file in checkpoints.folder(ZOO["llama"], "bf16").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "own.py").touch()
    pyint8.load(tmp_path, "cpu", trust_remote_code=True, progress=False)
    assert given == [None]
