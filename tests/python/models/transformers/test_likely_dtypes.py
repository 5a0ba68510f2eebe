"""In which dtypes a load is likely to have a model, and that transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch_state import default_dtype
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint import checkpoint_of_files, open_checkpoint
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
    assert likely_dtypes(dtype, None, request_of({"dtype": "float64"})) == found


def test_a_dict_without_the_whole_has_the_default(request_of: Any) -> None:
    with default_dtype(BF16):
        assert likely_dtypes({"text_config": F16}, None, request_of({})) == [BF16, F16]


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
        ({"dtype": "bf16", "text_config": {"dtype": "float16"}}, []),
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


def shards_of(folder: Path, metadata: dict[str, Any]) -> None:
    """Makes a checkpoint of one file one with an index, of one shard."""
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    names = open_checkpoint(folder / "shard.safetensors")
    index = {"metadata": metadata, "weight_map": dict.fromkeys(names, "shard.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("metadata", "found"),
    [({"total_size": 2}, [BF16]), ({"dtype": "float32"}, [F32]), ({"dtype": None}, []), ({"dtype": ["float16"]}, [])],
    ids=str,
)
def test_an_index_says_it_of_its_shards(
    metadata: dict[str, Any], found: list[torch.dtype], request_of: Any, tmp_path: Path
) -> None:
    save_file({"a": torch.zeros(1, dtype=BF16)}, tmp_path / "model.safetensors")
    shards_of(tmp_path, metadata)
    for checkpoint in (open_checkpoint(tmp_path), checkpoint_of_files([str(tmp_path / "shard.safetensors")])):
        assert likely_dtypes("auto", checkpoint, request_of({})) == found
        assert likely_dtypes("auto", checkpoint, request_of({"dtype": "float16"})) == [F16]


def test_the_configuration_of_a_subfolder(request_of: Any, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text('{"dtype": "float16"}')
    assert likely_dtypes("auto", None, request_of({"dtype": "float32"}, subfolder="inner")) == [F16]
    assert likely_dtypes("auto", None, request_of({"dtype": "float32"}, subfolder="other")) == []


def test_no_folder_and_nothing_in_the_cache() -> None:
    assert likely_dtypes("auto", None, LoadRequest(path="no/such", base="no/such")) == []


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Guess | None]:
    """What heads of loads are told to guess."""
    told: list[Guess | None] = []
    monkeypatch.setattr(Preparation, "start_head_start", lambda _, device_map, budget, guess: told.append(guess))
    return told


def copy_of_llama(checkpoints: CheckpointStore, folder: Path, configured: str | None) -> None:
    source = checkpoints.folder(ZOO["llama"], "bf16")
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": configured}))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")


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
    given: list[Guess],
) -> None:
    copy_of_llama(checkpoints, tmp_path, configured)
    model = pyint8.load(tmp_path, "cpu", dtype=dtype, progress=False)
    assert [(guess.dtype, guess.is_16_bit) for guess in given] == [found]
    assert model.dtype == found[0]


@pytest.mark.parametrize(
    ("metadata", "found", "becomes"),
    [({"dtype": "float32"}, (F32, False), F32), ({"dtype": None}, (None, False), F16)],
    ids=str,
)
def test_loads_go_by_the_index_of_shards(
    metadata: dict[str, Any],
    found: tuple[torch.dtype | None, bool],
    becomes: torch.dtype,
    checkpoints: CheckpointStore,
    tmp_path: Path,
    given: list[Guess],
) -> None:
    copy_of_llama(checkpoints, tmp_path, None)
    shards_of(tmp_path, metadata)
    model = pyint8.load(tmp_path, "cpu", progress=False)
    assert [(guess.dtype, guess.is_16_bit) for guess in given] == [found]
    assert model.dtype == becomes


def test_code_of_a_checkpoint_is_not_guessed_at(
    checkpoints: CheckpointStore, tmp_path: Path, given: list[Guess | None]
) -> None:
    for file in checkpoints.folder(ZOO["llama"], "bf16").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "own.py").touch()
    pyint8.load(tmp_path, "cpu", trust_remote_code=True, progress=False)
    assert given == [None]
