"""Experts of classes outside of transformers' experts interface: int8 all the same, or 16 bit and said to be so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import build
from oracle import state
from safetensors.torch import load_file, save_file
from test_experts import compare, with_weights_of
from zoo import randomise

import pyint8
from pyint8.quantizer.experts.modules import Int8Experts

EXPERTS = pyint8.Int8Config(experts=True)


def small(model_type: str, **fields: Any) -> Any:
    config = tf.CONFIG_MAPPING[model_type](vocab_size=96, hidden_size=32, num_attention_heads=4, **fields)
    return tf.AutoModelForCausalLM.from_config(config)


def step3p7() -> Any:
    config = build("step3p7").config
    config.text_config.mlp_layer_types = ["sparse"] * config.text_config.num_hidden_layers
    config.text_config.share_expert_dim = 24
    return tf.Step3p7ForConditionalGeneration(config)


def longcat() -> Any:
    attention = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    sizes = {"expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "num_layers": 2, "head_dim": 8}
    return small("longcat_flash", n_routed_experts=4, zero_expert_num=0, moe_topk=2, **attention, **sizes)


def dbrx() -> Any:
    experts = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96}
    return tf.DbrxForCausalLM(tf.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts))


def saved(make: Callable[[], Any], folder: Path) -> Any:
    model = randomise(make(), make.__name__, outliers=False).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


def test_step_3_7(tmp_path: Path) -> None:
    theirs = saved(step3p7, tmp_path / "16")
    ours = pyint8.load(tmp_path / "16", "cpu", model=type(theirs), config=EXPERTS, dtype=torch.bfloat16)
    found = {name: module for name, module in ours.named_modules() if isinstance(module, Int8Experts)}
    assert len(found) == 2
    assert all(compare(module, theirs.get_submodule(name)) == 8 for name, module in found.items())
    for fused in (False, True):
        pyint8.save(ours, tmp_path / str(fused), fused_experts=fused)
        assert state(pyint8.load(tmp_path / str(fused), "cpu", model=type(theirs))) == state(ours)


def test_llama_4_computes_as_in_16_bit(tmp_path: Path) -> None:
    theirs = saved(lambda: build("llama4_text"), tmp_path).float()
    ours = pyint8.load(tmp_path, "cpu", config=EXPERTS, dtype=torch.float32)
    tokens = torch.arange(2, 26).view(2, 12)
    with_weights_of(theirs, ours)
    with torch.no_grad():
        expected, found = (model(tokens).logits for model in (theirs, ours))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert ours.generate(tokens, max_new_tokens=4, min_new_tokens=4).shape == (2, 16)


def test_llama_4_with_experts_in_16_bit_is_saved_and_loaded(tmp_path: Path) -> None:
    """transformers takes the experts of every int8 checkpoint apart, also of those that it has saved whole."""
    saved(lambda: build("llama4_text"), tmp_path / "16")
    usual = pyint8.load(tmp_path / "16", "cpu", dtype=torch.bfloat16)
    pyint8.save(usual, tmp_path / "int8")
    assert state(pyint8.load(tmp_path / "int8", "cpu")) == state(usual)


def test_llama_4_with_experts_apart_is_as_in_transformers(tmp_path: Path) -> None:
    saved(lambda: build("llama4_text"), tmp_path / "16")
    ours = pyint8.load(tmp_path / "16", "cpu", config=EXPERTS, dtype=torch.bfloat16)
    pyint8.save(ours, tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    for key in [key for key in tensors if "experts" in key and key.endswith(("_proj", "_proj_SCB"))]:
        leaf = "SCB" if key.endswith("_SCB") else "weight"
        own, _, name = key.removesuffix("_SCB").rpartition(".")
        for number, one in enumerate(tensors.pop(key)):
            names = [name] if name == "down_proj" else ["gate_proj", "up_proj"]
            parts = zip(names, one.chunk(len(names)), strict=True)
            tensors |= {f"{own}.{number}.{part}.{leaf}": value.contiguous() for part, value in parts}
    save_file(tensors, tmp_path / "int8" / "model.safetensors", {"format": "pt"})
    apart, report = pyint8.load(tmp_path / "int8", "cpu", return_report=True)
    assert not report.loading_info["missing_keys"] | report.loading_info["unexpected_keys"]
    for whole, layer in zip(ours.model.layers, apart.model.layers, strict=True):
        for number, expert in enumerate(layer.feed_forward.experts):
            assert torch.equal(expert.down_proj.weight.CB, whole.feed_forward.experts.down_proj[number])


@pytest.mark.parametrize("make", [longcat, dbrx, lambda: build("jetmoe")], ids=["longcat", "dbrx", "jetmoe"])
def test_what_stays_in_16_bit_is_said(make: Callable[[], Any], tmp_path: Path, caplog: Any) -> None:
    model = saved(make, tmp_path)
    with caplog.at_level(logging.WARNING, "pyint8"):
        ours, report = pyint8.load(tmp_path, "cpu", model=type(model), config=EXPERTS, return_report=True)
    assert not any(isinstance(module, Int8Experts) for module in ours.modules())
    stacks = {
        (owner if leaf == "weight" else name): value.nbytes
        for name, value in model.named_parameters()
        for owner, _, leaf in [name.rpartition(".")]
        if value.ndim > 1
        and not isinstance(model.get_submodule(owner), torch.nn.Linear)
        and "expert" in f"{owner} {type(model.get_submodule(owner)).__name__}".lower()
    }
    assert len(stacks) >= 4
    for name, nbytes in stacks.items():
        assert report.skipped_bytes[name] == nbytes
        assert report.skipped[name].startswith("fused experts: ") or "way of its own" in report.skipped[name]
    (warned,) = [record.getMessage() for record in caplog.records if "are not int8" in record.getMessage()]
    assert "experts" in warned
