"""The oracle itself: it finds what is planted, nothing between two loads of the peer, and knows the peer's faults.

Without pyint8: these tests are about transformers and bitsandbytes alone.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from oracle import (
    compare_loading_info,
    compare_models,
    compare_outputs,
    compare_reloaded,
    compare_saved,
    peer_load,
    show,
    without_deserializers,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from zoo import PREQUANTIZED, ZOO, CheckpointStore

CPU = {"": "cpu"}
REUSABLE = [name for name in ZOO if name != "bert_fresh_head"]  # what the peer can load, run and quantize whole
MIXED_DTYPES_CRASH = {"gpt2", "opt", "bert_mlm", "falcon", "llava", "whisper", "gpt_oss", "qwen2_vl"}


@pytest.mark.parametrize("checkpoint", ["fp16", PREQUANTIZED])
@pytest.mark.parametrize("name", REUSABLE)
def test_two_peer_loads_do_not_differ(name: str, checkpoint: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    zoo_model = ZOO[name]
    folder = checkpoints.folder(zoo_model, checkpoint)
    with zoo_model.peer_help():
        (one, one_info), (two, two_info) = (
            peer_load(folder, zoo_model.cls, dtype="auto", device_map=CPU) for _ in range(2)
        )
    found = compare_models(one, two) + compare_loading_info(one_info, two_info)
    if checkpoint != PREQUANTIZED:
        found += compare_saved(one, two, tmp_path)
    found += compare_outputs(one, two, zoo_model.inputs(two))
    assert not found, show(found)


def _proj(model: PreTrainedModel) -> bnb.nn.Linear8bitLt:
    return model.model.layers[0].mlp.up_proj


def _norm(model: PreTrainedModel) -> Any:
    return model.model.norm


def _replace_with_plain_parameter(model: PreTrainedModel) -> None:
    attributes = vars(_proj(model).weight)
    _proj(model).weight = nn.Parameter(_proj(model).weight.data, requires_grad=False)
    vars(_proj(model).weight).update(attributes)


def _set_weight_data(model: PreTrainedModel, data: torch.Tensor) -> None:
    _proj(model).weight.data = data
    _proj(model).weight.CB = _proj(model).weight.data


def _share_storage(model: PreTrainedModel) -> None:
    weights = [_norm(model).weight, model.model.layers[0].input_layernorm.weight]
    both = torch.cat([weight.data for weight in weights])
    for weight, data in zip(weights, both.chunk(2), strict=True):
        weight.data = data


def _reorder(model: PreTrainedModel) -> None:
    q_proj = model.model.layers[0].self_attn._modules.pop("q_proj")
    model.model.layers[0].self_attn._modules["q_proj"] = q_proj


def _subclass_quantizer(model: PreTrainedModel) -> None:
    model.hf_quantizer.__class__ = type("OtherQuantizer", (Bnb8BitHfQuantizer,), {})


def _of_ours() -> Any:
    return type("Streamer", (), {"__module__": "pyint8.streaming"})()


def _hook_of_ours(model: PreTrainedModel) -> None:
    streamer = _of_ours()
    _norm(model).register_forward_pre_hook(lambda module, args: streamer and None)


WEIGHT = "parameters/model.layers.0.mlp.up_proj.weight"
PROJ = "modules/model.layers.0.mlp.up_proj/attributes"
NORM = "parameters/model.norm.weight"

Plant = Callable[[PreTrainedModel], Any]
PLANTED: dict[str, tuple[Plant, str]] = {
    "byte of data and CB": (lambda m: _proj(m).weight.data[0, :1].bitwise_xor_(1), f"{WEIGHT}/bytes: 1 of"),
    "byte of CB alone": (
        lambda m: setattr(_proj(m).weight, "CB", _proj(m).weight.CB ^ 1),
        f"{WEIGHT}/attributes/CB/bytes",
    ),
    "CB a copy": (lambda m: setattr(_proj(m).weight, "CB", _proj(m).weight.CB.clone()), f"{WEIGHT}/CB_aliases_data"),
    "CB None": (lambda m: setattr(_proj(m).weight, "CB", None), f"{WEIGHT}/attributes/CB"),
    "SCB one bit off": (
        lambda m: _proj(m).weight.SCB.view(torch.int32)[3:4].bitwise_xor_(1),
        f"{WEIGHT}/attributes/SCB/bytes: 1 of",
    ),
    "SCB in half": (lambda m: setattr(_proj(m).weight, "SCB", _proj(m).weight.SCB.half()), "attributes/SCB/dtype"),
    "SCB of another shape": (
        lambda m: setattr(_proj(m).weight, "SCB", _proj(m).weight.SCB[:, None]),
        "attributes/SCB/shape",
    ),
    "bias one bit off": (
        lambda m: m.model.layers[0].self_attn.q_proj.bias.data.view(torch.int16)[:1].add_(1),
        "bias/bytes",
    ),
    "sign of zero": (lambda m: _norm(m).weight.data[1:2].zero_().neg_(), f"{NORM}/bytes"),
    "dtype": (lambda m: _norm(m).float(), f"{NORM}/dtype"),
    "stride": (lambda m: _set_weight_data(m, _proj(m).weight.data.t().contiguous().t()), f"{WEIGHT}/stride"),
    "view of a larger storage": (
        lambda m: _set_weight_data(m, torch.cat([_proj(m).weight.data] * 2)[:96]),
        f"{WEIGHT}/storage_bytes",
    ),
    "storage shared": (_share_storage, "ties/storage"),
    "untied": (lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.data.clone())), "ties/address"),
    "tied by value, not by object": (
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.data)),
        "ties/object",
    ),
    "requires_grad": (lambda m: setattr(_norm(m).weight, "requires_grad", False), f"{NORM}/requires_grad"),
    "plain Parameter": (_replace_with_plain_parameter, f"{WEIGHT}/type"),
    "parameter attribute lost": (lambda m: delattr(_norm(m).weight, "_is_hf_initialized"), f"{NORM}/attributes"),
    "parameter attribute added": (lambda m: setattr(_norm(m).weight, "origin", "file"), f"{NORM}/attributes/origin"),
    "parameter has_fp16_weights": (lambda m: setattr(_proj(m).weight, "has_fp16_weights", True), "has_fp16_weights"),
    "order of modules": (_reorder, "order/parameters"),
    "module type": (lambda m: setattr(_norm(m), "__class__", nn.LayerNorm), "modules/model.norm/type"),
    "module attribute added": (lambda m: setattr(_norm(m), "note", 1), "modules/model.norm/attributes/note"),
    "in_features": (lambda m: setattr(_proj(m), "in_features", 65), f"{PROJ}/in_features"),
    "source_cls": (lambda m: setattr(_proj(m), "source_cls", FalconLinear), f"{PROJ}/source_cls"),
    "threshold an int": (lambda m: setattr(_proj(m).state, "threshold", 6), f"{PROJ}/state/threshold"),
    "state.has_fp16_weights": (lambda m: setattr(_proj(m).state, "has_fp16_weights", True), f"{PROJ}/state/has_fp16"),
    "already run": (lambda m: _proj(m).init_8bit_state(), f"{PROJ}/state/CB"),
    "a module in training mode": (lambda m: _norm(m).train(), "modules/model.norm/attributes/training"),
    "a hook": (lambda m: _norm(m).register_forward_hook(print), "modules/model.norm/attributes/_forward_hooks"),
    "buffer": (lambda m: m.model.rotary_emb.inv_freq.mul_(2), "buffers/model.rotary_emb.inv_freq/bytes"),
    "buffer made persistent": (
        lambda m: m.model.rotary_emb._non_persistent_buffers_set.discard("inv_freq"),
        "order/state_dict",
    ),
    "bias lost": (
        lambda m: m.model.layers[0].self_attn.q_proj.register_parameter("bias", None),
        "q_proj.bias: only in",
    ),
    "config": (lambda m: setattr(m.config, "use_cache", False), "model/config/use_cache"),
    "config threshold": (
        lambda m: setattr(m.config.quantization_config, "llm_int8_threshold", 5.0),
        "model/config/quantization_config/llm_int8_threshold",
    ),
    "config._is_quantized": (lambda m: delattr(m.config, "_is_quantized"), "attributes/config/_is_quantized"),
    "generation config": (lambda m: setattr(m.generation_config, "top_k", 7), "model/generation_config/top_k"),
    "is_loaded_in_8bit": (lambda m: delattr(m, "is_loaded_in_8bit"), "is_loaded_in_8bit: only in theirs"),
    "is_quantized": (lambda m: setattr(m, "is_quantized", False), "modules//attributes/is_quantized"),
    "quantization_method a str": (
        lambda m: setattr(m, "quantization_method", "bitsandbytes"),
        "modules//attributes/quantization_method",
    ),
    "quantizer type": (_subclass_quantizer, "modules//attributes/hf_quantizer/type"),
    "quantizer pre_quantized": (lambda m: setattr(m.hf_quantizer, "pre_quantized", True), "hf_quantizer/pre_quantized"),
    "modules_to_not_convert": (
        lambda m: m.hf_quantizer.modules_to_not_convert.append("x"),
        "hf_quantizer/modules_to_not_convert",
    ),
    "hf_device_map": (lambda m: setattr(m, "hf_device_map", {"": "cpu"}), "attributes/hf_device_map: only in ours"),
    "weight conversions": (lambda m: setattr(m, "_weight_conversions", [1]), "modules//attributes/_weight_conversions"),
    "name_or_path": (lambda m: setattr(m.model, "name_or_path", ""), "modules/model/attributes/name_or_path"),
    "ours on the model": (
        lambda m: setattr(m, "load_report", _of_ours()),
        "remains/model/load_report: pyint8.streaming",
    ),
    "ours on a parameter": (lambda m: setattr(_norm(m).weight, "origin", [_of_ours()]), "remains/model/_modules/model"),
    "ours in the config": (lambda m: setattr(m.config, "extra", {"a": _of_ours()}), "remains/model"),
    "ours in a hook's closure": (_hook_of_ours, "closure streamer: pyint8.streaming"),
}


def peer_qwen2(checkpoints: CheckpointStore) -> PreTrainedModel:
    """Tied, with biases and a buffer: everything the plants touch is in one model."""
    zoo_model = ZOO["qwen2"]
    return peer_load(checkpoints.folder(zoo_model, "fp16"), zoo_model.cls, dtype="auto", device_map=CPU)[0]


@pytest.fixture(scope="session")
def theirs(checkpoints: CheckpointStore) -> PreTrainedModel:
    return peer_qwen2(checkpoints)


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_difference_is_found(plant: str, theirs: PreTrainedModel, checkpoints: CheckpointStore) -> None:
    change, where = PLANTED[plant]
    ours = peer_qwen2(checkpoints)
    change(ours)
    found = compare_models(ours, theirs)
    assert any(where in line for line in found), show(found)


def test_nan_payloads_are_told_apart_and_equal_ones_are_not() -> None:
    def model_with(payload: int) -> PreTrainedModel:
        model = ZOO["bert_mlm"].build().half()
        for parameter in model.parameters():
            parameter.data.fill_(1)
        model.bert.embeddings.LayerNorm.weight.data.view(torch.int16)[0] = payload
        return model

    assert compare_models(model_with(0x7E01), model_with(0x7E01)) == []
    found = compare_models(model_with(0x7E01), model_with(0x7E02))
    assert [line.partition(":")[0] for line in found] == ["parameters/bert.embeddings.LayerNorm.weight/bytes"]


def test_allowed_paths_and_orders_without_meaning(checkpoints: CheckpointStore) -> None:
    one, two = peer_qwen2(checkpoints), peer_qwen2(checkpoints)
    one.hf_quantizer.modules_to_not_convert = two.hf_quantizer.modules_to_not_convert[::-1]
    assert compare_models(one, two) == []
    _proj(one).source_cls = FalconLinear
    assert len(compare_models(one, two)) == 1
    assert compare_models(one, two, allow=["modules/*/attributes/source_cls"]) == []


def test_outputs_saved_files_and_loading_info_are_compared(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    one, two = (peer_qwen2(checkpoints) for _ in range(2))
    _proj(one).weight.data[0, :1].bitwise_xor_(64)
    one.config.use_cache = False
    places = {line.partition(": ")[0] for line in compare_saved(one, two, tmp_path)}
    tensor = "saved/model.safetensors/tensors/model.layers.0.mlp.up_proj.weight/bytes"
    assert places == {tensor, "saved/config.json/use_cache"}
    one.config.use_cache = True
    outputs = compare_outputs(one, two, ZOO["qwen2"].inputs(two))
    assert any(line.startswith("output/logits/bytes") for line in outputs)
    info: dict[str, set[Any]] = {"missing_keys": {"a", "b"}, "unexpected_keys": set(), "mismatched_keys": {("c", 1, 2)}}
    assert compare_loading_info(info, {**info, "missing_keys": {"b", "a"}}) == []
    assert len(compare_loading_info(info, {**info, "mismatched_keys": set()})) == 1


@pytest.mark.parametrize("name", REUSABLE)
def test_the_peer_cannot_save_what_it_loaded_from_int8(name: str, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    zoo_model = ZOO[name]
    with zoo_model.peer_help():
        model, info = peer_load(checkpoints.folder(zoo_model, PREQUANTIZED), zoo_model.cls, device_map=CPU)
        with pytest.raises(NotImplementedError):
            model.save_pretrained(tmp_path)
        assert not any(info.values())
        model._weight_conversions = without_deserializers(model._weight_conversions)
        model.save_pretrained(tmp_path)
        assert compare_reloaded(model, tmp_path) == []


@pytest.mark.parametrize("name", REUSABLE)
def test_the_peer_ignores_dtype_beside_int8(name: str, checkpoints: CheckpointStore) -> None:
    zoo_model = ZOO[name]
    folder = checkpoints.folder(zoo_model, PREQUANTIZED)
    with zoo_model.peer_help():
        model, _ = peer_load(folder, zoo_model.cls, dtype=torch.bfloat16, device_map=CPU)
    assert torch.float16 in {parameter.dtype for parameter in model.parameters()}
    with torch.no_grad(), pytest.raises(RuntimeError) if name in MIXED_DTYPES_CRASH else nullcontext():
        model(**zoo_model.inputs(model))


def test_the_peer_cannot_use_a_fresh_head(checkpoints: CheckpointStore) -> None:
    zoo_model = ZOO["bert_fresh_head"]
    model, info = peer_load(checkpoints.folder(zoo_model, "fp16"), zoo_model.cls, dtype="auto", device_map=CPU)
    assert "classifier.weight" in info["missing_keys"]
    with pytest.raises(AttributeError, match="CB"):
        model(**zoo_model.inputs(model))
    with pytest.raises(NotImplementedError, match="Char"):  # draws int8 from a normal distribution
        peer_load(checkpoints.folder(zoo_model, PREQUANTIZED), zoo_model.cls, dtype="auto", device_map=CPU)


def test_the_peer_does_not_quantize_falcon(checkpoints: CheckpointStore) -> None:
    zoo_model = ZOO["falcon"]
    alone, _ = peer_load(checkpoints.folder(zoo_model, "fp16"), zoo_model.cls, dtype="auto", device_map=CPU)
    assert not any(isinstance(module, bnb.nn.Linear8bitLt) for module in alone.modules())
    broken, _ = peer_load(checkpoints.folder(zoo_model, PREQUANTIZED), zoo_model.cls, dtype="auto", device_map=CPU)
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        broken(**zoo_model.inputs(broken))
    with zoo_model.peer_help():
        helped, _ = peer_load(checkpoints.folder(zoo_model, "fp16"), zoo_model.cls, dtype="auto", device_map=CPU)
    with pytest.raises(RuntimeError, match="modified inplace"):  # parallel_attn adds to MatMul8bitLt's view
        helped(**zoo_model.inputs(helped))
