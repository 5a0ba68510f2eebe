"""What a form in the cache is for: a load that asks for the same, and no other."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checksums import add_checksums, damage
from failing import failing
from transformers import GenerationConfig
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import ChecksumError, ReadError
from pyint8.operations import wanted
from pyint8.operations.cached import wait_for_fills

CPU = {"": "cpu"}


@pytest.fixture
def llama(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama"], "bf16")


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "source"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(source: Path, cache: Path, **options: Any) -> tuple[Any, bool]:
    """The model, and whether it came from the cache, which is complete afterwards."""
    model, report = pyint8.load(source, CPU, cache=cache, return_report=True, **options)
    assert wait_for_fills(60)
    return model, report.from_cache


@pytest.mark.parametrize(
    ("keyword", "value", "plain"),
    [
        ("num_hidden_layers", 1, 2),
        ("rms_norm_eps", 0.5, 1e-6),
        ("use_cache", False, True),
        ("tie_word_embeddings", True, False),
    ],
)
def test_keywords_are_of_their_own_load(source: Path, cache: Path, keyword: str, value: Any, plain: Any) -> None:
    for _ in range(2):
        model, was_cached = load(source, cache, **{keyword: value})
        assert getattr(model.config, keyword) == value
    assert was_cached
    model, was_cached = load(source, cache)
    assert not was_cached
    assert getattr(model.config, keyword) == plain
    assert len(model.model.layers) == 2
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is False


def test_keywords_that_say_where_files_are_do_not_count(source: Path, cache: Path) -> None:
    load(source, cache, local_files_only=True, use_safetensors=True, revision="main")
    assert load(source, cache)[1]


def test_an_object_cannot_be_told_from_another(source: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pyint8"):
        load(source, cache, generation_config=GenerationConfig(max_new_tokens=3))
    assert "is not cached: generation_config is an object" in caplog.text
    assert not cache.exists()


def test_what_is_not_asked_for_is_no_reason(source: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pyint8"):
        load(source, cache, ignore_mismatched_sizes=False)
    assert not caplog.text
    assert load(source, cache, ignore_mismatched_sizes=False)[1]


def test_a_form_is_made_of_bytes_that_were_compared(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(add_checksums(source)["model.layers.0.mlp.gate_proj.weight"], 5)
    with caplog.at_level(logging.WARNING, "pyint8"):
        load(source, cache, options=pyint8.StreamOptions(checksums=False))
    assert "is not cached: " in caplog.text
    assert "gate_proj" in caplog.text
    assert not list(cache.iterdir())
    with pytest.raises(ChecksumError, match="gate_proj"):
        load(source, cache)


@pytest.mark.parametrize("where", ["weights", "sub"])
def test_the_configuration_counts_wherever_the_weights_are(source: Path, cache: Path, where: str) -> None:
    (source / where).mkdir()
    shutil.move(source / "model.safetensors", source / where)
    config = source / "config.json"
    arguments = {}
    if where == "sub":
        config, arguments = Path(shutil.move(config, source / where)), {"subfolder": "sub"}
    said = json.loads(config.read_text()) | (
        {"transformers_weights": "weights/model.safetensors"} if not arguments else {}
    )
    config.write_text(json.dumps(said))
    load(source, cache, **arguments)
    assert load(source, cache, **arguments)[1]
    config.write_text(json.dumps({**said, "rms_norm_eps": 0.5}))
    model, was_cached = load(source, cache, **arguments)
    assert not was_cached
    assert model.model.norm.variance_epsilon == 0.5


@pytest.mark.parametrize(("code", "is_cached"), [("own.Own", True), ("someone/else--own.Own", False)])
def test_code_that_lies_elsewhere_may_change(source: Path, code: str, is_cached: bool) -> None:
    config = source / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModelForCausalLM": code}}))
    asked = wanted.Wanted(str(source), CPU, "auto", None, None, {"trust_remote_code": True}, pyint8.StreamOptions())
    why_not = asked.why_not(open_checkpoint(source), str(source))
    assert (why_not is None) == is_cached
    assert is_cached or "its code lies in another repository" in str(why_not)


def test_a_revision_of_code_has_its_own_form(source: Path) -> None:
    """In a folder around the one with the weights, too."""
    checkpoint, keys = open_checkpoint(source), set()
    for arguments in ({}, {"code_revision": "a"}, {"code_revision": "b"}, {"subfolder": source.name}):
        path = source.parent if "subfolder" in arguments else source
        asked = wanted.Wanted(str(path), CPU, "auto", None, None, arguments, pyint8.StreamOptions())
        for text in ("one", "two"):
            (path / "own.py").write_text(text)
            keys.add(asked.key(checkpoint, str(path)))
    assert len(keys) == 8


@pytest.mark.parametrize("package", ["pyint8", "bitsandbytes", "torch", "transformers"])
def test_another_release_has_another_form(
    source: Path, cache: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    asked = wanted.Wanted(str(source), CPU, "auto", None, None, {}, pyint8.StreamOptions())
    checkpoint = add_checksums(source)
    before, version = asked.key(checkpoint, str(source)), metadata.version
    assert asked.key(checkpoint, str(source)) == before
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == package else version(name))
    assert asked.key(checkpoint, str(source)) != before


@pytest.mark.parametrize(("name", "nth"), [("model.safetensors", 1), (".pyint8-cache.json", 2)])
def test_a_form_that_cannot_be_read_once_stays(
    source: Path, cache: Path, name: str, nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    load(source, cache)
    (folder,) = cache.iterdir()
    made = folder.stat().st_ino
    with mock.patch.object(os, "open", failing("open", nth, lambda path, *_: path == str(folder / name))):
        model, was_cached = load(source, cache)
    assert not was_cached
    assert "cannot be read this time" in caplog.text
    expected = pyint8.load(source, CPU).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert load(source, cache)[1]
    assert folder.stat().st_ino == made


def test_a_form_whose_use_cannot_be_noted_is_used(source: Path, cache: Path) -> None:
    load(source, cache)
    with mock.patch.object(os, "utime", failing("utime")):
        assert load(source, cache)[1]


@pytest.mark.parametrize("name", ["listdir", "open"])
def test_a_disk_that_fails_is_said(source: Path, cache: Path, name: str) -> None:
    about = (str(source), str(source / "generation_config.json"))
    with (
        mock.patch.object(os, name, failing(name, 1, lambda path=".", *_: path in about)),
        pytest.raises(ReadError, match="Input/output error"),
    ):
        pyint8.load(source, CPU, cache=cache)
