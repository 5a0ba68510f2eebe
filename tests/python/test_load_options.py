"""What can be asked of a load: configurations, classes, keywords, offload, a bar, a report. The peer does the same."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from oracle import assert_same, compare_outputs, differences, state
from safetensors.torch import save_file
from tqdm import tqdm
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config
from pyint8.checkpoint import open_checkpoint

IDS = torch.tensor([[5, 6, 7, 8]])
Load = Callable[..., Any]


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (Int8Config(has_fp16_weight=True), {"llm_int8_has_fp16_weight": True}),
        (Int8Config(threshold=0), {"llm_int8_threshold": 0.0}),
        (Int8Config(threshold=2.5), {"llm_int8_threshold": 2.5}),
        (Int8Config(skip_modules=["mlp", "lm_head"]), {"llm_int8_skip_modules": ["mlp", "lm_head"]}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else repr(value),
)
def test_every_config_is_the_peers(
    name: str, config: Int8Config, fields: dict[str, Any], load: Load, peer: Load
) -> None:
    ours, theirs = load(name, config=config), peer(name, **fields)
    assert_same(ours, theirs)
    assert not compare_outputs(ours, theirs, ZOO[name].inputs(ours))


def test_nothing_skipped(load: Load, peer: Load) -> None:
    ours, theirs = load(config=Int8Config(skip_modules=[])), peer(llm_int8_skip_modules=[])
    assert_same(ours, theirs)
    assert isinstance(ours.lm_head, bnb.nn.Linear8bitLt)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_a_tied_head_is_never_skipped_for_want_of_a_weight(
    name: str, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """The peer makes it a Linear8bitLt over the embedding's float16 weight, which raises when it is called."""
    model, report = load(name, config=Int8Config(skip_modules=[]), return_report=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(IDS).logits.isfinite().all()
    assert "tied" in report.skipped["lm_head"]
    assert "initialized afresh" not in caplog.text


@pytest.mark.parametrize("cls", [tf.AutoModelForCausalLM, tf.LlamaForCausalLM, tf.AutoModel, tf.LlamaModel])
def test_a_class_can_be_given(cls: type, load: Load, peer: Load) -> None:
    assert_same(load(model=cls), peer(cls=cls))


def test_keywords_reach_transformers(load: Load, checkpoints: CheckpointStore) -> None:
    assert load(attn_implementation="eager").config._attn_implementation == "eager"
    assert load(attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert load(revision="of no folder")(IDS).logits.isfinite().all()
    classifier = load("bert_mlm", model=tf.BertForSequenceClassification, num_labels=5)
    assert classifier.classifier.out_features == 5
    assert load(use_cache=False).config.use_cache is False
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    found = load(folder=folder.parent, subfolder=folder.name)
    assert not differences(state(found), state(load()))


def test_keywords_reach_transformers_beside_int8(load: Load) -> None:
    assert load(checkpoint=PREQUANTIZED, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(checkpoint=PREQUANTIZED, use_cache=False).config.use_cache is False


@pytest.mark.parametrize("checkpoint", ["bf16", PREQUANTIZED])
def test_the_report_adds_up(checkpoint: str, load: Load, checkpoints: CheckpointStore) -> None:
    model, report = load(checkpoint=checkpoint, return_report=True)
    stored = open_checkpoint(checkpoints.folder(ZOO["llama"], checkpoint))
    assert report.checkpoint_bytes == stored.nbytes == report.engine["bytes_delivered"]
    assert sum(report.tensors.values()) == len(model.state_dict()) - len(companions(model))
    int8 = sum(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules())
    assert report.tensors["pre-quantized" if checkpoint == PREQUANTIZED else "int8"] == int8 == 14
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert 0 < report.gigabytes_per_second < 1000
    assert report.skipped.keys() == {"lm_head", "model.embed_tokens"}


def test_a_planned_map_is_the_peers(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    """A map that is made after the plan: what finds no room on the CPU goes to the disk."""
    kwargs: dict[str, Any] = {"dtype": torch.float16, "device_map": "auto", "max_memory": {"cpu": 80_000}}
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    int8 = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    theirs = tf.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=int8, offload_folder=tmp_path / "theirs", **kwargs
    )
    ours = pyint8.load(folder, config=Int8Config(fp32_cpu_offload=True), offload_folder=tmp_path / "ours", **kwargs)
    assert ours.hf_device_map == theirs.hf_device_map
    assert set(ours.hf_device_map.values()) == {"cpu", "disk"}
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert mine.device == other.device, name


def companions(model: torch.nn.Module) -> list[str]:
    return [name for name in model.state_dict() if name.endswith((".SCB", ".weight_format"))]


@pytest.mark.parametrize("plan", ["auto", "sequential"])
@pytest.mark.parametrize("own", [True, False])
def test_the_callers_max_memory_is_left_alone(
    plan: str, own: bool, checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    memory = {"cpu": "1GiB"}
    if own:
        module = torch.nn.Sequential(torch.nn.Linear(16, 16))
        save_file(module.state_dict(), tmp_path / "model.safetensors")
        pyint8.load(tmp_path, plan, max_memory=memory, model=module)
    else:
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), plan, max_memory=memory)
    assert memory == {"cpu": "1GiB"}


@pytest.mark.parametrize("off", ["model.layers.1", "lm_head"])
def test_offload_is_the_peers(off: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    """Without a GPU nothing is left to quantize then; the map is transformers' own all the same."""
    modules = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    kwargs: dict[str, Any] = {"dtype": torch.float16, "offload_folder": tmp_path}
    kwargs["device_map"] = {name: "disk" if name == off else "cpu" for name in modules}
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    int8 = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    theirs = tf.LlamaForCausalLM.from_pretrained(folder, quantization_config=int8, **kwargs)
    ours = pyint8.load(folder, config=Int8Config(fp32_cpu_offload=True), **kwargs)
    assert ours.hf_device_map == theirs.hf_device_map
    assert {name for name, p in ours.named_parameters() if p.is_meta} == {
        name for name, p in theirs.named_parameters() if p.is_meta
    }
    assert not compare_outputs(ours, theirs, {"input_ids": IDS})


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["bf16", PREQUANTIZED])
def test_the_bar_counts_bytes(checkpoint: str, load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    _, report = load(checkpoint=checkpoint, progress=True, return_report=True)
    shown = capfd.readouterr().err
    assert "Loading int8: 100%" in shown
    assert "{0}/{0}".format(tqdm.format_sizeof(report.checkpoint_bytes)) in shown
    assert "B/s" in shown
    assert "Loading weights" not in shown  # transformers' own


@pytest.mark.parametrize(
    ("progress", "terminal", "bar"), [(None, False, False), (False, True, False), (None, True, True)]
)
def test_the_bar_is_for_terminals(
    progress: bool | None,
    terminal: bool,
    bar: bool,
    load: Load,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    load(progress=progress)
    assert ("Loading int8" in capsys.readouterr().err) == bar
    assert tf.utils.logging.is_progress_bar_enabled()
