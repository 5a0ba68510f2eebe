"""int8 checkpoints of mixtures as transformers 4.57 saves them: `python transformers4.py MODEL_TYPE FOLDER`, with 4.57.

`int8_form` makes the same without it, from the same weights; `digest` tells whether it did.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 48},
}
# Of what transformers 4.57.6 and bitsandbytes 0.50.2 write on a CPU.
DIGESTS = {
    "mixtral": "9ebb115640e77b5746066b30e2038605aa96178166a908c768f71d34214e9b6c",
    "qwen3_moe": "6cae089a054b57d905b677a051c253ea4a48f8d34174e187ee33daf9f23751d6",
}


def weights(model_type: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, bf16, by their names in it."""
    sizes = CONFIGS[model_type]
    hidden, heads, head = sizes["hidden_size"], sizes["num_attention_heads"], sizes["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (sizes["vocab_size"], hidden),
    }
    for layer in range(sizes["num_hidden_layers"]):
        own = f"model.layers.{layer}"
        attention = {"q": heads, "k": sizes["num_key_value_heads"], "v": sizes["num_key_value_heads"]}
        shapes |= {f"{own}.self_attn.{name}_proj.weight": (count * head, hidden) for name, count in attention.items()}
        shapes[f"{own}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes |= {f"{own}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if model_type == "qwen3_moe":
            shapes |= {f"{own}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
            block, inner, experts = f"{own}.mlp", sizes["moe_intermediate_size"], sizes["num_experts"]
            first, second, last = "gate_proj", "up_proj", "down_proj"
        else:
            block, inner, experts = f"{own}.block_sparse_moe", sizes["intermediate_size"], sizes["num_local_experts"]
            first, second, last = "w1", "w3", "w2"
        shapes[f"{block}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            one = f"{block}.experts.{expert}"
            shapes |= {f"{one}.{first}.weight": (inner, hidden), f"{one}.{second}.weight": (inner, hidden)}
            shapes[f"{one}.{last}.weight"] = (hidden, inner)
    return {name: _random(name, shape) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randint(-1000, 1001, shape, generator=generator) / 20000).to(torch.bfloat16)


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    """Whether transformers 4 quantizes it: every linear layer but the head, routers and experts too."""
    return tensor.ndim == 2 and name not in ("lm_head.weight", "model.embed_tokens.weight")


def int8_form(model_type: str) -> dict[str, torch.Tensor]:
    """What 4.57 saves of a model of these weights that it has loaded in 8 bit."""
    import bitsandbytes as bnb

    saved: dict[str, torch.Tensor] = {}
    for name, tensor in weights(model_type).items():
        saved[name] = tensor
        if is_quantized(name, tensor):
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(tensor.half())
            own = name.removesuffix("weight")
            layout = torch.tensor(0, dtype=torch.uint8)
            saved |= {name: codes, f"{own}SCB": scales, f"{own}weight_format": layout}
    return saved


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(model_type: str, folder: Path) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(weights(model_type))
    model.save_pretrained(folder / "16 bit")
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "16 bit", dtype=torch.bfloat16, device_map="cpu", quantization_config=quantization
    )
    model.save_pretrained(folder / "int8")
    print(transformers.__version__, digest(load_file(folder / "int8" / "model.safetensors")))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
