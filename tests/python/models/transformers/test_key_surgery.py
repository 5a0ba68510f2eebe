"""Checkpoints whose names are not quite the model's: prefixes, heads, extra and missing keys, files of other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from oracle import SERIALIZABLE, compare_loading_info, compare_models, peer_load, show
from safetensors.torch import load_file, save_file
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import CheckpointNotFoundError, ModelNotSupportedError

KWARGS: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float16}
Copy = Callable[..., Path]


def same_as_the_peer(folder: Path, cls: Any, *, allow: tuple[str, ...] = (), **kwargs: Any) -> dict[str, Any]:
    """Loads both ways, compares all, and returns what was missing and unexpected."""
    theirs, their_info = peer_load(folder, cls, **KWARGS, **kwargs)
    torch.manual_seed(0)
    ours, report = pyint8.load(folder, model=cls, return_report=True, **KWARGS, **kwargs)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE, *allow])
    found += compare_loading_info(report.loading_info, their_info)
    assert not found, show(found)
    return report.loading_info


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in edit(load_file(file)).items()}, file, {"format": "pt"})


# The head that is not in the checkpoint stays an ordinary Linear here, and becomes int8 without a weight there.
FRESH_HEAD = ("*lm_head*", "*llm_int8_skip_modules*", "*modules_to_not_convert*")


def test_a_base_model_becomes_a_causal_one(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    change(folder, lambda t: {n.removeprefix("model."): x for n, x in t.items() if n != "lm_head.weight"})
    info = same_as_the_peer(folder, tf.LlamaForCausalLM, allow=FRESH_HEAD)
    assert info["missing_keys"] == {"lm_head.weight"}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_causal_model_becomes_a_base_one(name: str, checkpoints: CheckpointStore) -> None:
    same_as_the_peer(checkpoints.folder(ZOO[name], "bf16"), tf.AutoModel)


def test_a_base_model_without_its_prefix(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    change(folder, lambda t: {n.removeprefix("model."): x for n, x in t.items() if n != "lm_head.weight"})
    assert not any(same_as_the_peer(folder, tf.LlamaModel).values())


def test_extra_keys_are_reported_and_left(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    extra = {"model.layers.0.self_attn.extra.weight": torch.ones(3, 3), "nowhere": torch.ones(2)}
    change(folder, lambda t: {**t, **extra})
    assert same_as_the_peer(folder, tf.LlamaForCausalLM)["unexpected_keys"] == set(extra)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_missing_keys_are_reported_and_initialized(name: str, copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    change(folder, lambda t: {n: x for n, x in t.items() if n != name})
    assert same_as_the_peer(folder, tf.LlamaForCausalLM)["missing_keys"] == {name}


def test_a_tied_head_that_is_stored_too(copy_of: Copy) -> None:
    folder = copy_of("llama_tied", "bf16")
    change(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    same_as_the_peer(folder, tf.LlamaForCausalLM)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_configuration_may_name_the_weights(copy_of: Copy, sharded: bool) -> None:
    folder = copy_of("llama_sharded" if sharded else "llama", "bf16")
    usual = "model.safetensors.index.json" if sharded else "model.safetensors"
    other = usual.replace("model", "adapted")
    (folder / usual).rename(folder / other)
    with pytest.raises(CheckpointNotFoundError):
        pyint8.load(folder, "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": other}))
    same_as_the_peer(folder, tf.LlamaForCausalLM)


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OddConfig(PretrainedConfig):
    model_type = "odd"
    def __init__(self, width=64, **kwargs):
        self.width = width
        super().__init__(**kwargs)

class OddModel(PreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        self.inner = torch.nn.Linear(config.width, config.width)
        self.norm = torch.nn.LayerNorm(config.width)
        self.out = torch.nn.Linear(config.width, 4)
        self.post_init()
    def forward(self, inputs):
        return self.out(self.norm(self.inner(inputs)))
"""


def test_code_that_comes_with_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(CODE)
    config = {"model_type": "odd", "architectures": ["OddModel"], "width": 64}
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {"inner.weight": torch.randn(64, 64), "inner.bias": torch.randn(64), "out.bias": torch.randn(4)}
    tensors |= {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64), "out.weight": torch.randn(4, 64)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    same_as_the_peer(tmp_path, tf.AutoModel, trust_remote_code=True)
    model = pyint8.load(tmp_path, "cpu", trust_remote_code=True)
    assert model.inner.weight.dtype == torch.int8
    assert model(torch.randn(2, 64, dtype=torch.float16)).isfinite().all()


def test_code_by_another_name_than_the_class_that_transformers_has(copy_of: Copy) -> None:
    folder = copy_of("llama", "bf16")
    code = "from transformers import LlamaForCausalLM\n\nclass MyLlama(LlamaForCausalLM):\n    mine = True\n"
    (folder / "mine.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "mine.MyLlama"}
    (folder / "config.json").write_text(json.dumps(config))
    same_as_the_peer(folder, tf.AutoModelForCausalLM, trust_remote_code=True)
    assert pyint8.load(folder, "cpu", trust_remote_code=True).mine
    assert not hasattr(pyint8.load(folder, "cpu"), "mine")


def test_parts_of_a_model_in_dtypes_of_their_own(
    checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers has no such thing any more: that is said each time."""
    folder = checkpoints.folder(ZOO["llava"], "fp32")
    dtype = {"": torch.bfloat16, "vision_config": "float16"}
    theirs, _ = peer_load(folder, ZOO["llava"].cls, device_map="cpu", dtype=dtype)
    for _ in range(2):
        caplog.clear()
        ours = pyint8.load(folder, "cpu", dtype=dtype)
        assert "here torch.bfloat16: what dtype says of vision_config has no effect" in caplog.text
    found = compare_models(ours, theirs, allow=[SERIALIZABLE])
    assert not found, show(found)
    assert {value.dtype for value in ours.parameters() if value.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8"])
def test_a_quantization_that_is_said_of_the_text_model(method: str, copy_of: Copy) -> None:
    folder = copy_of("llava", "prequantized")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = {**config.pop("quantization_config"), "quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    if method == "fp8":
        with pytest.raises(ModelNotSupportedError, match="quantized already, by fp8"):
            pyint8.load(folder, "cpu")
        return
    theirs, _ = peer_load(folder, ZOO["llava"].cls, **KWARGS)
    ours = pyint8.load(folder, **KWARGS)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE, "modules//attributes/_weight_conversions*"])
    assert not found, show(found)


def test_a_fused_weight_becomes_two(tmp_path: Path) -> None:
    """DINOv2's gate and up projections are stored as one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    tf.Dinov2Model(tf.Dinov2Config(**sizes, use_swiglu_ffn=True)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert "encoder.layer.0.mlp.weights_in.weight" in load_file(tmp_path / "model.safetensors")
    assert not any(same_as_the_peer(tmp_path, tf.AutoModel).values())
    model = pyint8.load(tmp_path, model=tf.AutoModel, **KWARGS)
    assert model.encoder.layer[0].mlp.gate_proj.weight.dtype == torch.int8
