"""What dtype a load has where none is asked for: the checkpoint's, as transformers 5 has it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from oracle import SERIALIZABLE, compare_models, compare_outputs, peer_load, show
from safetensors.torch import save_file
from zoo import ZOO, CheckpointStore

import pyint8

IDS = torch.arange(8)[None]


@pytest.mark.parametrize("checkpoint", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_nothing_asked_for_is_what_transformers_gives(name: str, checkpoint: str, checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO[name], checkpoint)
    ours = pyint8.load(folder)
    theirs, _ = peer_load(folder, ZOO[name].cls, device_map={"": "cpu"})
    found = compare_models(ours, theirs, allow=[SERIALIZABLE])
    found += compare_outputs(ours, theirs, ZOO[name].inputs(theirs))
    assert not found, show(found)


def test_none_is_float16_and_says_so(checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyint8"):
        model = pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu", dtype=None)
    assert model.dtype == torch.float16
    assert "dtype=None" in caplog.text


def test_a_saved_model_comes_back_in_its_dtype(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    model = pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu")
    model.save_pretrained(tmp_path)
    again = pyint8.load(tmp_path, "cpu")
    assert again.dtype == model.dtype == torch.bfloat16
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_activations_beyond_float16_stay_finite(tmp_path: Path) -> None:
    """A bf16 model whose weights float16 holds, and whose activations it does not."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    source = tf.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        source.model.layers[0].mlp.up_proj.weight.fill_(600.0)
        source.model.layers[0].mlp.gate_proj.weight.fill_(600.0)
        source.model.layers[0].post_attention_layernorm.weight.fill_(30.0)
        source.model.embed_tokens.weight.abs_()
    source.save_pretrained(tmp_path)
    assert source(IDS).logits.isfinite().all()
    assert pyint8.load(tmp_path, "cpu")(IDS).logits.isfinite().all()
    assert not pyint8.load(tmp_path, "cpu", dtype=torch.float16)(IDS).logits.isfinite().all()  # the model is one


def test_a_module_of_ones_own_keeps_what_is_stored(tmp_path: Path) -> None:
    tensors = {"0.weight": torch.randn(4, 4).bfloat16(), "1.weight": torch.randn(4).float(), "1.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4))
    filled = pyint8.load(tmp_path / "x.safetensors", "cpu", model=module, config=pyint8.Int8Config(skip_modules=[]))
    assert filled[0].weight.dtype == torch.int8
    assert (filled[1].weight.dtype, filled[1].bias.dtype) == (torch.float32, torch.float32)
