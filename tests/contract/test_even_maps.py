"""What each GPU begins with under an even map lies where transformers puts it. The checkpoints are headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors_bytes import framed, write
from transformers.integrations.accelerate import _get_device_map
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from pyint8.checkpoint import open_checkpoint
from pyint8.quantizer.experts.modules import make_int8
from pyint8.streaming import first_tensors
from pyint8.streaming.guesses import EXPERTS, Guess
from pyint8.streaming.head_start import _WORTHWHILE_BYTES as WORTHWHILE
from pyint8.streaming.head_start import FirstTensors

GQA = {"num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **GQA}
LLAMA_70B = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, **GQA}
OPT_13B = {
    "hidden_size": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "word_embed_proj_dim": 5120,
}
QWEN3_MOE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "moe_intermediate_size": 768,
}
CONFIGS: dict[str, tf.PretrainedConfig] = {
    "llama 8B": tf.LlamaConfig(**LLAMA_8B),
    "llama 70B": tf.LlamaConfig(**LLAMA_70B),
    "few large layers": tf.LlamaConfig(**(LLAMA_70B | {"num_hidden_layers": 16})),
    "mistral 7B": tf.MistralConfig(),
    "gpt2 XL": tf.GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "opt 13B": tf.OPTConfig(**OPT_13B),
    "qwen3 tied": tf.Qwen3Config(vocab_size=151936, hidden_size=2560, num_hidden_layers=36, tie_word_embeddings=True),
    "large embedding": tf.Gemma2Config(),
    "experts": tf.Qwen3MoeConfig(**QWEN3_MOE),
    "encoder and decoder": tf.BartConfig(
        d_model=2048, encoder_ffn_dim=8192, decoder_ffn_dim=8192, encoder_layers=24, decoder_layers=24
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    with torch.device("meta"):
        config = CONFIGS[request.param]
        auto = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
        return auto.from_config(config, dtype=torch.bfloat16)


def save_header(tensors: Iterable[tuple[str, torch.Size]], path: Path) -> None:
    """A file that says it holds tensors of these names and shapes; where their bytes should be it has a hole."""
    header, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    content = framed(header)
    write(str(path), content)
    with path.open("r+b") as file:
        file.truncate(len(content) + end)


def even_map(model: Any, memory: dict[int, int], skip: list[str] | None = None) -> dict[str, int]:
    config = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    quantizer = Bnb8BitHfQuantizer(config, pre_quantized=False)
    quantizer.validate_environment = lambda *_, **__: None  # there is no GPU
    if not any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        quantizer.preprocess_model(model=model, device_map="balanced", dtype=model.dtype, checkpoint_files=None)
    found: dict[str, int] = _get_device_map(model, "balanced", dict(memory), quantizer)
    return found


def device_of(name: str, device_map: dict[str, int]) -> int:
    return device_map[max((module for module in device_map if f"{name}.".startswith(f"{module}.")), key=len)]


@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_each_gpu_begins_with_what_it_gets(
    model: Any, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_header(((name, each.shape) for name, each in model.named_parameters()), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    device_map = even_map(model, dict.fromkeys(range(gpus), 10**12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    guess = Guess(are_int8=False, dtype=torch.bfloat16, is_16_bit=True)
    parts = first_tensors.first_tensors(checkpoint, "balanced", is_bounded=False, guess=guess)
    assert [part.device.index for part in parts] == list(range(gpus))
    # As little memory as is enough for a head start, less what has landed, gives the same map.
    assert even_map(model, {part.device.index: part.if_free - part.nbytes for part in parts}) == device_map
    asked = {part.device.index: asked_for(part) for part in parts}
    for part in parts:
        held = {name for name in checkpoint if device_of(name, device_map) == part.device.index}
        assert held.issuperset(asked[part.device.index])
        layers = {first_tensors._layer(name) for name in held} - {""}
        assert asked[part.device.index] or len(layers) < 3
        assert part.nbytes < max(1, part.reserved) <= max(1, sum(checkpoint[name].numel for name in held)) * 1.1
    early = sum(checkpoint[name].nbytes for names in asked.values() for name in names)
    # int8 is half, and what is early has room where int8 will be; an embedding may take most of it.
    assert 0.07 < early / checkpoint.nbytes < 0.5


UNEVEN = {
    "wo in 32 bit": tf.T5Config(d_model=1024, d_kv=128, num_heads=128, d_ff=65536, num_layers=24),
    "wo in 32 bit, gated": tf.T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    ),
    "nothing in int8": tf.LlamaConfig(**LLAMA_8B),
    "nothing in int8, few layers": tf.LlamaConfig(**(LLAMA_70B | {"num_hidden_layers": 8})),
}


@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
@pytest.mark.parametrize("name", UNEVEN)
def test_a_model_larger_than_guessed_gets_the_same_map(
    name: str, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = UNEVEN[name]
    auto = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float16)
    save_header(((name, each.shape) for name, each in model.named_parameters()), tmp_path / "model.safetensors")
    for module_name, module in model.named_modules():
        if module_name.endswith("wo"):
            module.float()  # as from_pretrained does
    skip = ["wo", "lm_head"] if config.is_encoder_decoder else ["model", "lm_head"]
    device_map = even_map(model, dict.fromkeys(range(gpus), 10**12), skip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    guess = Guess(are_int8=False, dtype=torch.float16, is_16_bit=True)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    parts = first_tensors.first_tensors(checkpoint, "balanced", is_bounded=False, guess=guess)
    assert even_map(model, {part.device.index: part.if_free - part.nbytes for part in parts}, skip) == device_map


@pytest.mark.parametrize(
    ("config", "gpus", "begins"),
    [
        (tf.Qwen3MoeConfig(**QWEN3_MOE), 2, True),
        (tf.Qwen3MoeConfig(**QWEN3_MOE), 4, True),
        (CONFIGS["llama 70B"], 4, True),
        (CONFIGS["llama 70B"], 2, False),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
@pytest.mark.parametrize("are_int8", [True, False])
def test_gpus_of_80_gb_begin(
    config: Any, gpus: int, begins: bool, are_int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_header(list(one_by_one(model)), tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    guess = Guess(are_int8, torch.bfloat16, quantizer=1, is_16_bit=True)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    parts = first_tensors.first_tensors(checkpoint, "auto", is_bounded=False, guess=guess)
    assert {part.if_free < 79 * 10**9 for part in parts} == {begins}
    for part in first_tensors.first_tensors(
        checkpoint, "auto", is_bounded=False, guess=guess._replace(is_16_bit=False)
    ):
        assert part.if_free >= int(2 * checkpoint.nbytes / 0.8) // gpus  # 16 bit may be loaded as 32


def asked_for(part: FirstTensors) -> list[str]:
    left, names = part.nbytes, []
    for entry in part.entries:
        if entry.nbytes >= WORTHWHILE:
            left -= entry.nbytes
            if left < 0:
                break
            names.append(entry.name)
    return names


@pytest.mark.parametrize("are_int8", [True, False])
@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_experts_land_where_they_go(gpus: int, are_int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all of them, in 16 bit or in int8, which moves the borders."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(tf.Qwen3MoeConfig(**QWEN3_MOE), dtype=torch.bfloat16)
    save_header(list(one_by_one(model)), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    if are_int8:
        for layer in model.model.layers:
            make_int8(layer.mlp.experts)
    device_map = even_map(model, dict.fromkeys(range(gpus), 10**12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    guess = Guess(are_int8, torch.bfloat16, quantizer=1, is_16_bit=True)
    parts = first_tensors.first_tensors(checkpoint, "balanced", is_bounded=False, guess=guess)
    early: dict[int, int] = {}
    count = 0
    for part in parts:
        assert part.guess is not None
        requests = part.guess().requests
        count += len(requests)
        found = {device_of(request.entry.name, device_map) for request in requests}
        assert found == {part.device.index} == {request.device.index for request in requests}
        early[part.device.index] = part.nbytes + sum(request.final_bytes for request in requests)
        assert early[part.device.index] < part.reserved
        assert not [name for name in asked_for(part) if EXPERTS in name]
    assert count > (0.9, 0.8, 0.7, 0.5)[(2, 3, 4, 8).index(gpus)] * 48 * 128 * 3
    assert even_map(model, {part.device.index: part.if_free - early[part.device.index] for part in parts}) == device_map


def one_by_one(model: Any) -> Iterator[tuple[str, torch.Size]]:
    """A model's tensors, as checkpoints have them: an expert each."""
    for name, parameter in model.named_parameters():
        head, is_gated, _ = name.partition("gate_up_proj")
        if not is_gated and not name.endswith("experts.down_proj"):
            yield name, parameter.shape
            continue
        rows, columns = parameter.shape[1:]
        for number in range(len(parameter)):
            if is_gated:
                yield f"{head}{number}.gate_proj.weight", torch.Size((rows // 2, columns))
                yield f"{head}{number}.up_proj.weight", torch.Size((rows // 2, columns))
            else:
                yield f"{name.removesuffix('down_proj')}{number}.down_proj.weight", torch.Size((rows, columns))
