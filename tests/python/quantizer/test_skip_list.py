"""Lists of modules to skip: an entry without effect is told, with the one that was probably meant."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_models import Net, drawn, on_meta, saved
from small_model import Small, int8_modules, preprocessed
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlavaForConditionalGeneration
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config
from pyint8.errors import OptionError
from pyint8.quantizer.skip_list import dead_entries, name_matches, nearest_entry

Load = Callable[..., Any]
MEANT = {
    "vision_tower": "model.vision_tower",
    "vison_tower": "model.vision_tower",
    "vision_tower.vision_model.encoder": "model.vision_tower.encoder",
    "dwon_proj": "down_proj",
    "lm_head.weight": "lm_head",
    "language_model.layers.1": "model.language_model.layers.1",
    "layers.0.self_attn": r".*\.layers.0.self_attn",
}


def linear_names(name: str) -> dict[str, None]:
    return dict.fromkeys(n for n, module in ZOO[name].build().named_modules() if isinstance(module, nn.Linear))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "skip_modules" in record.getMessage()]


@pytest.fixture(scope="module")
def llava() -> dict[str, None]:
    return linear_names("llava")


@pytest.mark.parametrize("entry", MEANT)
def test_the_nearest_entry_that_matches_is_found(entry: str, llava: dict[str, None]) -> None:
    nearest = nearest_entry(entry, llava)
    assert nearest == MEANT[entry]
    assert any(name_matches(name, [nearest]) for name in llava)


def test_blocks_that_are_numbered_are_meant_by_a_pattern() -> None:
    llama = linear_names("llama")
    nearest = nearest_entry("mlp", llama)
    assert nearest == r"model.layers.\d+.mlp"
    assert [name for name in llama if name_matches(name, [nearest])] == [n for n in llama if ".mlp." in n]


def test_what_is_like_nothing_has_no_nearest(llava: dict[str, None]) -> None:
    assert nearest_entry("zzz", llava) is None


@pytest.mark.parametrize(
    ("entry", "dead"),
    [
        ("mlp", True),  # a block's: what is in it has other endings
        ("blocks.0.mlp", False),
        ("0.mlp", True),
        (r"blocks\.\d\.mlp", False),
        ("attn", False),
        ("head", False),
        ("embed", False),  # has no linear module in it: stays unquantized anyway
        ("norm", False),
        ("shift", True),
        ("head.weight", True),
        ("embed.weight", False),
        ("", False),
    ],
)
def test_an_entry_is_dead_if_it_keeps_nothing(entry: str, dead: bool) -> None:
    net = Net()
    linear = {name: None for name, module in net.named_modules() if isinstance(module, nn.Linear) or "attn" in name}
    assert dead_entries(net, [entry], linear, name_matches) == [entry] * dead


def test_an_entry_is_not_dead_where_others_do_what_it_says() -> None:
    """Lists that were found name parameters too, and are passed on."""
    net = Net()
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    entries = ["head", "head.bias", "head.weight", "mlp", r"blocks.\d+.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.2"]
    assert dead_entries(net, entries, linear, name_matches) == ["head.bias"]  # it has none
    assert dead_entries(net, entries[:-1], linear, name_matches) == ["head.bias", "mlp"]


# --- on every road ----------------------------------------------------------------------------------------------------


def test_load_tells_dead_entries_in_one_warning(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    skip = ["vision_tower", "lm_head", "dwon_proj"]
    load("llava", model=LlavaForConditionalGeneration, config=Int8Config(skip_modules=skip))
    (text,) = warnings_of(caplog)
    assert "'vision_tower' (nearest: 'model.vision_tower'), 'dwon_proj' (nearest: 'down_proj')" in text
    assert "'lm_head'" not in text
    assert "LlavaForConditionalGeneration" in text


def test_what_the_warning_proposes_works(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    skip = ["model.vision_tower", "down_proj", "lm_head"]
    model = load("llava", model=LlavaForConditionalGeneration, config=Int8Config(skip_modules=skip))
    assert not warnings_of(caplog)
    assert int8_modules(model)
    assert not [n for n in int8_modules(model) if n.startswith("model.vision_tower") or n.endswith("down_proj")]


def test_the_drop_in_tells_dead_entries(checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config(skip_modules=["mlp"]))
    assert [r"'mlp' (nearest: 'model.layers.\d+.mlp')" in text for text in warnings_of(caplog)] == [True]


def test_a_takeover_tells_dead_entries(checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["mlp"])
    with pyint8.takeover():
        AutoModelForCausalLM.from_pretrained(checkpoints.folder(ZOO["llama"], "bf16"), quantization_config=config)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("meta", [True, False])
def test_a_module_of_ones_own_tells_dead_entries(tmp_path: Path, meta: bool, caplog: pytest.LogCaptureFixture) -> None:
    module = on_meta() if meta else Net()
    pyint8.load(saved(tmp_path, drawn(Net())), "cpu", model=module, config=Int8Config(skip_modules=["mlp", "haed"]))
    (text,) = warnings_of(caplog)
    assert r"'mlp' (nearest: 'blocks.\d+.mlp'), 'haed' (nearest: 'head')" in text


def test_entries_that_were_found_or_come_with_the_checkpoint_are_not_told(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load("bert_mlm")  # its list has the name of a bias
    load("t5", PREQUANTIZED)
    model = load("llama", config=Int8Config(skip_modules=["mlp"]))
    caplog.clear()
    model.save_pretrained(tmp_path)
    reloaded = load(folder=tmp_path)
    assert "mlp" in reloaded.config.quantization_config.llm_int8_skip_modules
    assert not warnings_of(caplog)


def test_a_list_without_dead_entries_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pyint8"):
        preprocessed(Small(), skip_modules=["embed", "attn"])
    assert not warnings_of(caplog)


# --- entries that are nothing -----------------------------------------------------------------------------------------


NO_PATTERN = Int8Config(skip_modules=["lm_head", "*mlp*"])
REFUSED = pytest.raises(OptionError, match=r"the entry '\*mlp\*' of skip_modules is neither .*nothing to repeat")


def test_an_entry_that_is_no_pattern_is_refused(load: Load, checkpoints: CheckpointStore) -> None:
    with REFUSED:
        load("llama", config=NO_PATTERN)
    with REFUSED:
        AutoModelForCausalLM.from_pretrained(checkpoints.folder(ZOO["llama"], "bf16"), quantization_config=NO_PATTERN)


def test_a_module_of_ones_own_is_as_strict(tmp_path: Path) -> None:
    with REFUSED:
        pyint8.load(saved(tmp_path, drawn(Net())), "cpu", model=Net(), config=NO_PATTERN)
