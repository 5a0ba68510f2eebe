"""Every architecture that transformers has, as small as its configuration allows."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto

MOST_PARAMETERS = 25_000_000

# Fields of configurations, by what they count. Where one is a number, it becomes this one.
_SMALL: dict[str, int] = {
    **dict.fromkeys(("d_model", "dim", "emb_dim", "embed_dim", "hidden_size", "n_embd", "mm_hidden_size"), 32),
    **dict.fromkeys(("decoder_hidden_size", "embedding_size", "encoder_embed_dim", "out_hidden_size"), 32),
    **dict.fromkeys(("projection_dim", "text_embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "hidden_dim"), 48),
    **dict.fromkeys(("decoder_intermediate_size", "intermediate_size", "mlp_dim", "n_inner"), 48),
    **dict.fromkeys(("expert_ffn_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("decoder_layers", "decoder_num_hidden_layers", "depth", "encoder_layers", "n_layer"), 2),
    **dict.fromkeys(("n_layers", "num_decoder_layers", "num_encoder_layers", "num_hidden_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_codebooks", "num_experts_per_tok", "num_experts_per_token", "num_key_value_heads"), 2),
    **dict.fromkeys(("d_kv", "head_dim", "hidden_size_per_layer_input", "num_mel_bins", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "mamba_head_dim", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(
        ("num_queries", "patch_size", "qk_rope_head_dim", "shape_size", "ssm_state_size", "state_size", "v_head_dim"), 8
    ),
    **dict.fromkeys(("coordinate_size", "num_image_tokens", "rotary_dim", "time_step_rank"), 4),
    **dict.fromkeys(("image_size", "kv_lora_rank", "max_source_positions", "q_lora_rank"), 16),
    **dict.fromkeys(("codebook_size", "max_target_positions"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_ctx", "n_positions"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "n_shared_experts", "topk_group"), 1),
    **{name: number for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))},
    **dict.fromkeys(("image_token_id", "image_token_index"), 127),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 125),
    "video_token_id": 126,
    "vision_start_token_id": 124,
    "vision_end_token_id": 123,
    "boi_token_id": 122,
    "eoi_token_id": 121,
}
# What speaks of layers that a small model has not, and what is not to be given back to a configuration.
_LEFT_OUT = {
    *("architectures", "dtype", "id2label", "label2id", "out_features", "out_indices", "per_layer_config"),
    *("stage_names", "transformers_version"),
}
# In this order, a model's class is looked for.
_HEADS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "AUDIO_CLASSIFICATION",
)
MODEL_TYPES = sorted(tf.CONFIG_MAPPING.keys())


class NotBuiltError(Exception):
    """An architecture that this recipe does not fit; its message says why."""


def build(model_type: str) -> tf.PreTrainedModel:
    """A small model with random weights.

    Raises:
        NotBuiltError: Its configuration contradicts itself when made small, it is large all the same, needs a package
            that is not here, or is no model by itself.
    """
    try:
        config = _small_config(model_type)
        cls = _class_for(config)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
        if parameters > MOST_PARAMETERS:
            raise NotBuiltError(f"{parameters} parameters")
        return cls(config)
    except NotBuiltError:
        raise
    except Exception as error:  # whatever a configuration's own checks raise
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error


def _small_config(model_type: str) -> tf.PretrainedConfig:
    cls = tf.CONFIG_MAPPING[model_type]
    return cls.from_dict(_shrunk(cls().to_dict()))


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    small = {name: _small(name, value) for name, value in fields.items() if name not in _LEFT_OUT}
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # latent attention has keys for every head
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _small(name: str, value: Any) -> Any:
    if isinstance(value, dict) and (name.endswith("_config") or name in ("decoder", "encoder")):
        return _shrunk(value)
    if isinstance(value, dict) and name == "rope_parameters" and value.get("rope_type") == "default":
        return {**value, "mrope_section": [2, 1, 1]}  # where there is one: it adds up to half a head
    if isinstance(value, list | tuple) and name == "num_heads":
        return [2**stage for stage in range(len(value))]
    if isinstance(value, list) and name.endswith("layer_types"):
        return value[:2]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _SMALL[name] if is_number and name in _SMALL else value


def _class_for(config: tf.PretrainedConfig) -> Any:
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING") for head in _HEADS]
    for mapping in (*mappings, modeling_auto.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise NotBuiltError("no model class of its own")
