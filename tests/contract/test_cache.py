"""`pyint8.load(..., cache=...)`: the second load reads the int8 form, and gives the model of the first."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import compare_outputs, differences, show, state
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel, checkpoint_store

import pyint8
from pyint8.checkpoint.cache import CacheFolder
from pyint8.errors import OptionError
from pyint8.models.transformers import converting
from pyint8.operations.cached import wait_for_fills
from pyint8.streaming.write_behind import WriteBehind

pytestmark = pytest.mark.slow

CPU = {"": "cpu"}
FRESH = {"bert_fresh_head"}
"""Models with weights that the checkpoint lacks."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    return checkpoint_store(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def source(store: CheckpointStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.folder(ZOO["llama"], "bf16"), tmp_path / "source"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(source: Path, cache: Any, **options: Any) -> tuple[Any, bool]:
    """The model, and whether it came from the cache, which is complete afterwards."""
    options.setdefault("device_map", CPU)
    model, report = pyint8.load(source, cache=cache, return_report=True, **options)
    assert wait_for_fills(60)
    return model, report.from_cache


def entries(cache: Path, most_bytes: int = 10**9) -> list[str]:
    return [os.path.basename(entry.folder) for entry in CacheFolder(str(cache), most_bytes).entries()]


def assert_same(ours: Any, theirs: Any) -> None:
    found = differences(state(ours), state(theirs), allow=["*/attributes/*"])
    assert not found, show(found)


@pytest.mark.parametrize("zoo_model", ZOO.values(), ids=list(ZOO))
def test_the_second_load_gives_the_model_of_the_first(zoo_model: ZooModel, store: CheckpointStore, cache: Path) -> None:
    source = store.folder(zoo_model, "bf16")
    torch.manual_seed(0)
    first, was_cached = load(source, cache, model=zoo_model.cls)
    assert not was_cached
    torch.manual_seed(0)
    second, was_cached = load(source, cache, model=zoo_model.cls)
    assert was_cached == (zoo_model.name not in FRESH)
    assert_same(second, first)
    assert second.name_or_path == first.name_or_path == str(source)
    assert not compare_outputs(second, first, zoo_model.inputs(first))


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32},
        {"config": pyint8.Int8Config(skip_modules=["q_proj"])},
        {"config": pyint8.Int8Config(threshold=0.0)},
        {"config": pyint8.Int8Config(experts=True)},
    ],
)
def test_another_load_has_another_form(source: Path, cache: Path, other: dict[str, Any]) -> None:
    load(source, cache)
    model, was_cached = load(source, cache, **other)
    assert not was_cached
    assert_same(load(source, cache, **other)[0], model)
    assert load(source, cache)[1]
    assert len(entries(cache)) == 2


def test_the_same_load_said_otherwise_has_the_same_form(source: Path, cache: Path) -> None:
    load(source, cache, dtype="float16", config=pyint8.Int8Config(), device_map="cpu")
    assert load(source, cache, dtype=torch.float16)[1]


def test_a_source_that_changed_is_read_again(source: Path, cache: Path) -> None:
    load(source, cache)
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\x00\x00"
    path.write_bytes(content)
    model, was_cached = load(source, cache)
    assert not was_cached
    assert_same(model, pyint8.load(source, CPU))


def test_a_configuration_that_changed_is_read_again(source: Path, cache: Path) -> None:
    load(source, cache)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    model, was_cached = load(source, cache)
    assert not was_cached
    assert model.config.rms_norm_eps == 0.5


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "gone", "unsealed", "no seal"])
def test_a_damaged_form_is_made_again(source: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    load(source, cache)
    (folder,) = cache.iterdir()
    weights, seal = folder / "model.safetensors", folder / ".pyint8-cache.json"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "overwritten":
        weights.write_bytes(weights.read_bytes())
    elif damage == "gone":
        weights.unlink()
    elif damage == "unsealed":
        seal.write_text("{")
    else:
        seal.unlink()
    with caplog.at_level(logging.WARNING, "pyint8"):
        model, was_cached = load(source, cache)
    assert not was_cached
    assert ("made again" in caplog.text) == (damage != "no seal")
    assert_same(model, pyint8.load(source, CPU))
    assert load(source, cache)[1]


def test_the_least_recently_used_go_first(
    store: CheckpointStore, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {name: store.folder(ZOO[name], "bf16") for name in ("llama", "llama_tied", "gpt2", "opt")}
    for name in ("llama", "llama_tied", "gpt2"):
        load(sources[name], cache)
    sizes = {entry.source: entry.nbytes for entry in CacheFolder(str(cache), 0).entries()}
    assert load(sources["llama"], cache)[1]  # now llama_tied is the oldest
    monkeypatch.setenv("PYINT8_CACHE_BYTES", str(sum(sizes.values())))
    load(sources["opt"], cache)
    left = {entry.source for entry in CacheFolder(str(cache), 0).entries()}
    assert str(sources["opt"]) in left
    assert str(sources["llama_tied"]) not in left
    monkeypatch.setenv("PYINT8_CACHE_BYTES", "1000")
    shutil.rmtree(cache)
    with caplog.at_level(logging.WARNING, "pyint8"):
        load(sources["gpt2"], cache)
    assert "PYINT8_CACHE_BYTES" in caplog.text
    assert not entries(cache)


def test_what_a_load_uses_stays(source: Path, cache: Path) -> None:
    load(source, cache)
    folder = CacheFolder(str(cache), 0)
    (key,) = entries(cache)
    with folder.opened(key) as checkpoint:
        assert checkpoint is not None
        assert not folder.make_room(0)
        assert not folder.clear()
        assert entries(cache) == [key]
    assert [entry.source for entry in folder.clear()] == [str(source)]
    assert not list(cache.iterdir())


def test_the_users_cache(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(source, True)
    assert load(source, True)[1]
    assert len(entries(tmp_path / "xdg" / "pyint8")) == 1


LOADS = """
import sys
import pyint8
from pyint8.models import converted_files
from pyint8.operations.cached import wait_for_fills
converted_files._NOTED_BYTES = 1
for _ in range(2):
    _, report = pyint8.load(sys.argv[1], {"": "cpu"}, cache=sys.argv[2], return_report=True)
    print(report.from_cache, flush=True)
    assert wait_for_fills(60)
_, report = pyint8.load(sys.argv[1], {"": "cpu"}, cache=sys.argv[2], return_report=True)
print(report.from_cache, flush=True)
"""


def test_two_processes_fill_one_cache(source: Path, cache: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", LOADS, source, cache], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate()[0].split() for process in both]
    assert "True" in answers[0] + answers[1]
    assert all(len(answer) == 3 for answer in answers)
    assert len(entries(cache)) == 1
    assert load(source, cache)[1]
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


ENDS = """
import sys, time
import pyint8
from pyint8.models import converted_files
from pyint8.streaming.write_behind import WriteBehind
converted_files._NOTED_BYTES = 1
put = WriteBehind.put
def slow_put(*args):
    time.sleep(0.05)
    return put(*args)
WriteBehind.put = slow_put
pyint8.load(sys.argv[1], {"": "cpu"}, cache=sys.argv[2])
time.sleep(1)
"""


def test_a_process_that_ends_leaves_it_to_the_next(source: Path, cache: Path) -> None:
    subprocess.run([sys.executable, "-c", ENDS, source, cache], timeout=120, check=True)
    assert not entries(cache)
    (left,) = cache.glob(".*")
    assert (left / ".pyint8-journal").stat().st_size > 100
    _, was_cached = load(source, cache)
    assert not was_cached
    assert load(source, cache)[1]
    assert not list(cache.glob(".*"))


def test_the_load_does_not_wait_for_it(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, put = threading.Event(), WriteBehind.put

    def held(*args: Any) -> Any:
        go_on.wait(60)
        return put(*args)

    monkeypatch.setattr(WriteBehind, "put", held)
    model = pyint8.load(source, CPU, cache=cache)
    assert not wait_for_fills(0)
    with torch.no_grad():
        assert model(**ZOO["llama"].inputs(model)) is not None
    go_on.set()
    assert wait_for_fills(60)
    assert len(entries(cache)) == 1


def test_what_becomes_of_the_model_is_not_cached(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, run = threading.Event(), converting.Conversion.run

    def held(*args: Any) -> None:
        go_on.wait(60)
        run(*args)

    monkeypatch.setattr(converting.Conversion, "run", held)
    model = pyint8.load(source, CPU, cache=cache)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    go_on.set()
    assert wait_for_fills(60)
    assert_same(load(source, cache)[0], pyint8.load(source, CPU))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes"),
        ({"config": pyint8.Int8Config(has_fp16_weight=True)}, "16 bit"),
        ({"config": pyint8.Int8Config(fp32_cpu_offload=True)}, "several kinds"),
    ],
)
def test_what_is_not_cached_says_why(
    source: Path, cache: Path, options: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pyint8"):
        load(source, cache, **options)
    assert f"{source} is not cached: " in caplog.text
    assert why in caplog.text
    assert not cache.exists()


def test_what_is_int8_already(store: CheckpointStore, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pyint8"):
        load(store.folder(ZOO["llama"], PREQUANTIZED), cache)
    assert "is int8 already" in caplog.text


def test_refusals(source: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"pyint8\.save"):
        pyint8.load(source, "cpu", model=nn.Sequential(), cache=True)
    adapted = get_peft_model(pyint8.load(source, CPU), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OptionError, match="base model"):
        pyint8.load(tmp_path / "adapter", CPU, cache=True)
    for where in (None, 3, "", str(source / "config.json")):
        with pytest.raises(OptionError, match="cache is"):
            pyint8.load(source, CPU, cache=where)  # type: ignore[call-overload]
