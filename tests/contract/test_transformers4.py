"""int8 checkpoints of mixtures that transformers 4.57 saved, expert by expert, with routers in int8 too.

The checkpoint is made here from the same weights; a digest says that it is what 4.57 writes. With
PYINT8_TRANSFORMERS_4=PYTHON, of an environment that has it, it is written by transformers 4.57 itself.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers4 import CONFIGS, DIGESTS, digest, int8_form, weights
from transformers4 import __file__ as script

import pyint8
from pyint8.quantizer import EXPERT_SCALES
from pyint8.quantizer.experts.modules import Int8Experts

THEIR_PYTHON = os.environ.get("PYINT8_TRANSFORMERS_4")


@pytest.fixture(params=sorted(CONFIGS))
def genuine(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Model type and folder of a checkpoint that is what 4.57 writes, to the byte."""
    name, folder = request.param, tmp_path / "int8"
    if THEIR_PYTHON:
        subprocess.run([THEIR_PYTHON, script, name, tmp_path], check=True)
    else:
        folder.mkdir()
        save_file(int8_form(name), folder / "model.safetensors", {"format": "pt"})
        quantization = {"load_in_8bit": True, "quant_method": "bitsandbytes", "llm_int8_skip_modules": None}
        config = {"model_type": name, "dtype": "bfloat16", "quantization_config": quantization, **CONFIGS[name]}
        (folder / "config.json").write_text(json.dumps(config))
    assert digest(load_file(folder / "model.safetensors")) == DIGESTS[name]
    return name, folder


def test_it_loads_rightly(genuine: tuple[str, Path]) -> None:
    name, folder = genuine
    model, report = pyint8.load(folder, "cpu", model=model_class(name), return_report=True, progress=False)
    stored = load_file(folder / "model.safetensors")
    assert not report.loading_info["missing_keys"]
    assert not report.loading_info["unexpected_keys"]
    block, (first, second, last) = parts(name)
    for number, layer in enumerate(model.model.layers):
        experts, own = layer.mlp.experts, f"model.layers.{number}.{block}"
        assert isinstance(experts, Int8Experts)
        for expert in range(experts.num_experts):
            for leaf, suffix in (("weight", ""), ("SCB", EXPERT_SCALES)):
                one = [stored[f"{own}.experts.{expert}.{part}.{leaf}"] for part in (first, second, last)]
                assert torch.equal(getattr(experts, f"gate_up_proj{suffix}")[expert], torch.cat(one[:2]))
                assert torch.equal(getattr(experts, f"down_proj{suffix}")[expert], one[2])
        router = stored[f"{own}.gate.weight"] * stored[f"{own}.gate.SCB"].unsqueeze(-1) / 127
        assert torch.equal(layer.mlp.gate.weight, router.to(torch.bfloat16))


def test_it_computes_what_its_weights_say(genuine: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = genuine
    stored = load_file(folder / "model.safetensors")
    plain = {
        key: stored[key] * stored[key.removesuffix("weight") + "SCB"].unsqueeze(-1) / 127
        if stored[key].dtype == torch.int8
        else stored[key].float()
        for key in stored
        if key.endswith("weight")
    }
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    theirs = model_class(name).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ours = pyint8.load(folder, "cpu", model=model_class(name), dtype=torch.float32, progress=False)
    tokens = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        found, expected = ours(tokens).logits, theirs(tokens).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


def test_it_is_saved_again(genuine: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = genuine
    model = pyint8.load(folder, "cpu", model=model_class(name), progress=False)
    pyint8.save(model, tmp_path / "again")
    again = pyint8.load(tmp_path / "again", "cpu", model=model_class(name), progress=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_it_is_verified_against_its_source(genuine: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = genuine
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [model_class(name).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    source = tmp_path / "source"
    source.mkdir()
    tensors = weights(name)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    sound = pyint8.verify(folder, against=source, device="cpu")
    stored = load_file(folder / "model.safetensors")
    formats = [key for key in stored if key.endswith("weight_format")]
    assert sound.findings == ()
    experts = [key for key in formats if ".experts." in key or ".gate." in key]  # what `convert` writes no format of
    assert sound.compared == len(stored) - len(experts)
    changed = [key for key in stored if key.endswith((".experts.3." + parts(name)[1][0] + ".weight", ".gate.SCB"))]
    for key in changed:
        stored[key].view(-1)[5 % len(stored[key])] += 1
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert {found.tensor for found in pyint8.verify(folder, against=source, device="cpu").findings} == set(changed)


def model_class(name: str) -> Any:
    return {"mixtral": tf.MixtralForCausalLM, "qwen3_moe": tf.Qwen3MoeForCausalLM}[name]


def parts(name: str) -> tuple[str, tuple[str, str, str]]:
    """Where a checkpoint has the experts of a layer, and their weights: gate, up, down."""
    if name == "mixtral":
        return "block_sparse_moe", ("w1", "w3", "w2")
    return "mlp", ("gate_proj", "up_proj", "down_proj")
