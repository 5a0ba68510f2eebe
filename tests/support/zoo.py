"""Small random models, one of each architecture whose identity is promised, and the checkpoints made of them.

A checkpoint is "bf16", "fp16" or "fp32" (what `save_pretrained` writes of the model cast to that dtype) or
"prequantized": int8 weights with SCB and weight_format, unquantized tensors in float16, written by transformers itself.
"""

import functools
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as tf
from transformers.models.falcon import modeling_falcon

CHECKPOINT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PREQUANTIZED = "prequantized"
CHECKPOINTS = (*CHECKPOINT_DTYPES, PREQUANTIZED)

VOCAB = 128
IMAGE_TOKEN = 127

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ZooModel:
    name: str
    build: Callable[[], tf.PreTrainedModel]
    inputs: Callable[[tf.PreTrainedModel], Inputs]
    cls: type  # what the checkpoint is loaded as; for bert_fresh_head not what it was saved from
    note: str = ""
    max_shard_size: str = "1GB"
    # Entered around the peer's calls where the peer has to be helped to do what is promised.
    peer_help: Callable[[], AbstractContextManager[Any]] = nullcontext


def randomise(model: tf.PreTrainedModel, seed: str, *, outliers: bool = True) -> tf.PreTrainedModel:
    """Values of a realistic spread: no two rows alike, a few outliers, no bias all zeros, no norm all ones."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2:
                far_out = (torch.rand(param.shape, generator=generator) < 0.002) & outliers
                param.copy_(torch.where(far_out, 15 * noise, noise) * 0.05)
            elif name.endswith("weight"):
                param.copy_(1 + 0.1 * noise)
                if outliers:  # activations beyond bitsandbytes' threshold of 6 take another road in the matmul
                    param[0] = 8.0
            else:
                param.copy_(0.02 * noise)
    return model.eval()


def _token_ids(count: int, *, rows: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 2, (rows, count), generator=generator)  # no special token, no image token


def text_inputs(model: tf.PreTrainedModel) -> Inputs:
    ids = _token_ids(9)
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def seq2seq_inputs(model: tf.PreTrainedModel) -> Inputs:
    return text_inputs(model) | {"decoder_input_ids": _token_ids(5, seed=1).to(model.device)}


def whisper_inputs(model: tf.PreTrainedModel) -> Inputs:
    config = model.config
    shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
    sound = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    decoder_ids = _token_ids(5, seed=1)
    return {
        "input_features": sound.to(model.device, model.dtype),
        "decoder_input_ids": decoder_ids.to(model.device),
    }


def llava_inputs(model: tf.PreTrainedModel) -> Inputs:
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    image = torch.full((2, patches), IMAGE_TOKEN)
    ids = torch.cat([_token_ids(3), image, _token_ids(4, seed=3)], dim=1)
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def qwen2_vl_inputs(model: tf.PreTrainedModel) -> Inputs:
    vision = model.config.vision_config
    patches = torch.tensor([[1, 4, 4]] * 2)  # of each image: time, height, width
    image = torch.full((2, 16 // vision.spatial_merge_size**2), IMAGE_TOKEN)
    ids = torch.cat([_token_ids(3), image, _token_ids(4, seed=3)], dim=1)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(2 * 16, values, generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
        "image_grid_thw": patches.to(model.device),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int().to(model.device),
    }


SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    **SPECIAL,
}
BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
}


def _llama(**changes: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | changes))


def _gpt2() -> tf.PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **SPECIAL))


def _opt() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    return tf.OPTForCausalLM(tf.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, **SPECIAL))


def _bert() -> tf.PreTrainedModel:
    return tf.BertForMaskedLM(tf.BertConfig(**BERT))


def _t5() -> tf.PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0))


def _mixtral() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER | sizes))


def _qwen3_moe() -> tf.PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**DECODER | experts))


def _falcon() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    return tf.FalconForCausalLM(tf.FalconConfig(**sizes, bias=True, max_position_embeddings=64, **SPECIAL))


def _llava() -> tf.PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        text_config=tf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
    )
    return tf.LlavaForConditionalGeneration(config)


def _whisper() -> tf.PreTrainedModel:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCAB, "num_mel_bins": 8}
    positions = {"max_source_positions": 16, "max_target_positions": 32}
    config = tf.WhisperConfig(**layers, **sizes, **positions, **SPECIAL, decoder_start_token_id=1)
    return tf.WhisperForConditionalGeneration(config)


def _gemma() -> tf.PreTrainedModel:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER | {"head_dim": 16, "query_pre_attn_scalar": 16}))


def _qwen2() -> tf.PreTrainedModel:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, tie_word_embeddings=True))


def _gpt_oss() -> tf.PreTrainedModel:
    sizes = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**DECODER, **sizes))


def _qwen2_vl() -> tf.PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(
        vision_config={**vision, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={**DECODER, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=1,
        tie_word_embeddings=False,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def falcon_linears_are_plain() -> AbstractContextManager[Any]:
    """The peer converts `type(module) is nn.Linear` only; Falcon's subclass is one in all but name."""
    return mock.patch.object(modeling_falcon, "FalconLinear", torch.nn.Linear)


# Facts about transformers 5.23 and bitsandbytes 0.50.2 on the CPU, kept true by test_oracle.py.
# Every architecture: saved from int8 and reloaded without fault, but what was loaded from int8 cannot be saved again
# (NotImplementedError from ConversionOps.reverse_op, config.json already written).
MIXED = (
    "Pre-quantized at another dtype: forward raises RuntimeError, float16 weights met inputs or biases of that dtype."
)
FRESH = (
    "classifier and bert.pooler.dense are absent. The peer makes them Linear8bitLt over float16 Parameters: forward "
    "raises AttributeError (no attribute 'CB'). Pre-quantized: the load raises NotImplementedError "
    "('normal_kernel_cpu' not implemented for 'Char')."
)
FALCON = (
    "Unless helped the peer quantizes nothing, so its int8 checkpoint holds no int8; given one with int8 it loads it "
    "into FalconLinear without a word and forward raises RuntimeError (Half != signed char). Helped, forward needs "
    "no_grad: parallel_attn adds in place to a view of MatMul8bitLt's. "
)

_MODELS = (
    ZooModel("llama", _llama, text_inputs, tf.LlamaForCausalLM, "Untied."),
    ZooModel("llama_tied", lambda: _llama(tie_word_embeddings=True), text_inputs, tf.AutoModelForCausalLM),
    ZooModel("llama_sharded", _llama, text_inputs, tf.AutoModelForCausalLM, max_shard_size="40KB"),
    ZooModel("gpt2", _gpt2, text_inputs, tf.AutoModelForCausalLM, f"Conv1D, tied. {MIXED}"),
    ZooModel("opt", _opt, text_inputs, tf.AutoModelForCausalLM, f"Tied. {MIXED}"),
    ZooModel("bert_mlm", _bert, text_inputs, tf.BertForMaskedLM, f"Tied head with a bias. {MIXED}"),
    ZooModel("bert_fresh_head", _bert, text_inputs, tf.BertForSequenceClassification, FRESH),
    ZooModel("t5", _t5, seq2seq_inputs, tf.T5ForConditionalGeneration, "wo stays float32 at float16, unquantized."),
    ZooModel("mixtral", _mixtral, text_inputs, tf.AutoModelForCausalLM, "Experts renamed and fused; 16-bit."),
    ZooModel("qwen3_moe", _qwen3_moe, text_inputs, tf.AutoModelForCausalLM, "Experts fused; 16-bit."),
    ZooModel(
        "falcon", _falcon, text_inputs, tf.AutoModelForCausalLM, FALCON + MIXED, peer_help=falcon_linears_are_plain
    ),
    ZooModel("llava", _llava, llava_inputs, tf.LlavaForConditionalGeneration, f"Prefixes renamed. {MIXED}"),
    ZooModel("whisper", _whisper, whisper_inputs, tf.WhisperForConditionalGeneration, f"k_proj lacks a bias. {MIXED}"),
    ZooModel("gemma", _gemma, text_inputs, tf.AutoModelForCausalLM, "Gemma 2, tied."),
    ZooModel("qwen2", _qwen2, text_inputs, tf.AutoModelForCausalLM, "Biases on q, k and v; tied."),
    ZooModel(
        "gpt_oss",
        _gpt_oss,
        text_inputs,
        tf.AutoModelForCausalLM,
        f"Experts stored fused; 16-bit. Attention sinks. {MIXED}",
    ),
    ZooModel("qwen2_vl", _qwen2_vl, qwen2_vl_inputs, tf.Qwen2VLForConditionalGeneration, f"Prefixes renamed. {MIXED}"),
)
ZOO = {model.name: model for model in _MODELS}


def save(zoo_model: ZooModel, folder: Path, checkpoint_dtype: str) -> None:
    """Write the model cast to "bf16", "fp16" or "fp32", config.dtype with it, as save_pretrained does."""
    model = randomise(zoo_model.build(), zoo_model.name).to(CHECKPOINT_DTYPES[checkpoint_dtype])
    model.save_pretrained(folder, max_shard_size=zoo_model.max_shard_size)


def save_prequantized(zoo_model: ZooModel, folder: Path, source: Path) -> None:
    """Write the int8 checkpoint that transformers makes on the CPU of the fp16 checkpoint in `source`."""
    with zoo_model.peer_help():
        model = type(zoo_model.build()).from_pretrained(
            source,
            quantization_config=tf.BitsAndBytesConfig(load_in_8bit=True),
            dtype=torch.float16,
            device_map={"": "cpu"},
        )
        model.save_pretrained(folder, max_shard_size=zoo_model.max_shard_size)


class CheckpointStore:
    """Writes each checkpoint once, when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, zoo_model: ZooModel, checkpoint: str) -> Path:
        folder = self.root / f"{zoo_model.name}-{checkpoint}"
        if not folder.exists():
            half = folder.with_suffix(".half")  # a save that fails must not look like a checkpoint to the next test
            if checkpoint == PREQUANTIZED:
                save_prequantized(zoo_model, half, self.folder(zoo_model, "fp16"))
            else:
                save(zoo_model, half, checkpoint)
            half.rename(folder)
        return folder


@functools.cache
def checkpoint_store(root: Path) -> CheckpointStore:
    return CheckpointStore(root)
