"""Checkpoints of a model's shape with random weights: `python -m benchmarks.checkpoints llama-8b FOLDER`."""

from __future__ import annotations

import argparse
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_SHARD_BYTES = 5 * 10**9
_WRITERS = 4  # of a shard in memory each; one on machines without a GPU, whose memory is small

# The shapes of Llama-3.1-8B, Llama-3.2-1B, Qwen3-4B, GPT-2 XL, layers of Llama-3.1-70B, Qwen3-30B-A3B, and of the
# same with all of its 18,867 tensors and a third to a half of its widths; and small ones for machines without a GPU.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama-1b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "llama-70b-layers": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 3,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "llama-tiny": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4000,
        "tie_word_embeddings": False,
    },
    "gpt2-small": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    "llama-small": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "gpt2-xl": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
    },
}


# Enough of them for several GPUs: 32 GB.
CONFIGS["llama-70b-stack"] = {**CONFIGS["llama-70b-layers"], "num_hidden_layers": 16}

# The int8 form of another checkpoint, as bitsandbytes and transformers save it.
INT8_FORMS = {"llama-8b-int8": "llama-8b", "llama-tiny-int8": "llama-tiny"}
NAMES = sorted([*CONFIGS, *INT8_FORMS])


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and shapes as checkpoints have them: experts one by one, tied weights once; on meta."""
    from transformers.core_model_loading import revert_weight_conversion

    seen: set[int] = set()
    parameters = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            parameters[name] = parameter.detach()
    yield from revert_weight_conversion(model, parameters).items()


def _shards(model: torch.nn.Module, dtype: torch.dtype, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """The state dict of a model on meta, filled with random numbers, a shard at a time."""
    generator = torch.Generator(device=device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, parameter in _stored(model):
        random = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
        tensor = random.mul_(0.02).to(dtype).cpu()
        if size and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def make(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Writes the checkpoint unless it is there; random numbers come from the GPU where there is one.

    Args:
        name: Of a shape.
        folder: For the checkpoint.
        dtype: Of its tensors.
        changes: Fields of the configuration that differ.
    """
    import transformers

    if (folder / "config.json").exists():
        return folder
    if name in INT8_FORMS:
        return _save_int8(make(INT8_FORMS[name], folder.with_name(f"{folder.name}-source"), dtype), folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**CONFIGS[name], **changes}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, dtype=dtype)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = _write(_shards(model, dtype, device), folder, _WRITERS if device == "cuda" else 1)
    weight_map = {}
    for number, sizes in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"part-{number:05d}.safetensors", folder / final)
        weight_map.update(dict.fromkeys(sizes, final))
    total = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)  # last: its presence says that the rest is whole
    return folder


def _write(shards: Iterable[dict[str, torch.Tensor]], folder: Path, writers: int) -> list[dict[str, int]]:
    """Saves shards, some at a time, which takes longer than making them; returns the bytes of their tensors."""
    sizes = []
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(writers) as threads:
        for number, shard in enumerate(shards):
            path = folder / f"part-{number:05d}.safetensors"
            writing.append(threads.submit(save_file, shard, path, metadata={"format": "pt"}))
            sizes.append({key: tensor.nbytes for key, tensor in shard.items()})
            if len(writing) == writers:
                writing.popleft().result()
        for last in writing:
            last.result()
    return sizes


def _save_int8(source: Path, folder: Path) -> Path:
    import pyint8

    unfinished = folder.with_name(f"{folder.name}-unfinished")
    model = pyint8.load(source, device_map=None, dtype="float16", progress=False)
    model.save_pretrained(unfinished, max_shard_size=_SHARD_BYTES)
    unfinished.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    print(make(arguments.name, arguments.folder, getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
