"""Checkpoints of a model's shape with random weights: `python -m benchmarks.checkpoints llama-8b FOLDER`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_SHARD_BYTES = 5 * 10**9

# The shapes of Llama-3.1-8B, GPT-2 XL and a model for machines without a GPU.
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


def _shards(model: torch.nn.Module, dtype: torch.dtype, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """The state dict of a model on meta, filled with random numbers, a shard at a time."""
    generator = torch.Generator(device=device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    size = 0
    seen: set[int] = set()
    for name, parameter in model.state_dict(keep_vars=True).items():
        if id(parameter) in seen:  # tied
            continue
        seen.add(id(parameter))
        random = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
        tensor = random.mul_(0.02).to(dtype).cpu()
        if size and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def make(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the checkpoint unless it is there; random numbers come from the GPU where there is one."""
    import transformers

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    fields = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, dtype=dtype)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: list[dict[str, int]] = []
    for number, shard in enumerate(_shards(model, dtype, device)):
        save_file(shard, folder / f"part-{number:05d}.safetensors", metadata={"format": "pt"})
        shards.append({key: tensor.nbytes for key, tensor in shard.items()})
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    print(make(arguments.name, arguments.folder, getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
