"""PEFT's `target_parameters` on int8 experts, beside the same adapter on the weights that their codes stand for."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import build
from test_experts import TOKENS, with_weights_of
from zoo import ZOO, CheckpointStore, randomise

import pyint8
from pyint8.errors import ModelNotSupportedError, NonFiniteWeightError
from pyint8.quantizer.experts.modules import Int8Experts

peft = pytest.importorskip("peft")

NAMES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(target_modules=[], target_parameters=NAMES, r=3, lora_alpha=6, **fields)


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def pair(request: pytest.FixtureRequest, checkpoints: CheckpointStore) -> tuple[Any, Any]:
    """int8 experts, and the weights that they stand for, in fp32, both with the same adapter."""
    folder = checkpoints.folder(ZOO[request.param], "bf16")
    config = pyint8.Int8Config(experts=True)
    ours, usual = (pyint8.load(folder, "cpu", config=each, dtype=torch.float32) for each in (config, None))
    theirs = with_weights_of(usual, copy.deepcopy(ours))
    models = [peft.get_peft_model(model, lora(init_lora_weights=False)) for model in (ours, theirs)]
    generator = torch.Generator().manual_seed(7)
    for name, value in trained(models[0]).items():
        value.data.normal_(generator=generator).mul_(0.05)
        trained(models[1])[name].data.copy_(value)
    return models[0], models[1]


def trained(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_they_compute_as_the_weights_and_the_update(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert trained(ours).keys() == trained(theirs).keys()
    assert {value.dtype for value in trained(ours).values()} == {torch.float32}
    assert near(logits(ours), logits(theirs))
    with ours.disable_adapter(), theirs.disable_adapter():
        base = logits(ours)
        assert near(base, logits(theirs))
    assert not near(logits(ours), base)


def test_they_are_trained_alike(pair: tuple[Any, Any]) -> None:
    for model in pair:
        model(TOKENS, labels=TOKENS).loss.backward()
    ours, theirs = map(trained, pair)
    for name, value in ours.items():
        assert value.grad.abs().max() > 0
        assert near(value.grad, theirs[name].grad), name
    assert not any(value.grad is not None for value in pair[0].parameters() if not value.requires_grad)


def test_an_adapter_is_for_both(pair: tuple[Any, Any], checkpoints: CheckpointStore, tmp_path: Path) -> None:
    ours, theirs = pair
    ours.save_pretrained(tmp_path)
    expected = logits(ours)
    again = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path)
    assert near(logits(again), expected)
    loaded = peft.PeftModel.from_pretrained(ours.unload(), tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_two_adapters(pair: tuple[Any, Any]) -> None:
    ours, first = pair[0], logits(pair[0])
    ours.add_adapter("second", lora(init_lora_weights=False))
    assert torch.equal(logits(ours), first)
    ours.set_adapter("second")
    assert not near(logits(ours), first)
    ours.set_adapter("default")
    assert torch.equal(logits(ours), first)


def test_they_are_merged_into_the_codes(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    adapted = logits(ours)
    with ours.disable_adapter():
        base = logits(ours)
    ours.merge_adapter()
    merged = logits(ours)
    similar = torch.nn.functional.cosine_similarity
    assert similar(merged.flatten(), adapted.flatten(), dim=0) > 0.99
    assert (merged - adapted).norm() < 0.3 * (base - adapted).norm()
    ours.unmerge_adapter()
    assert (logits(ours) - adapted).norm() < 0.3 * (base - adapted).norm()
    whole = ours.merge_and_unload()
    assert any(isinstance(module, Int8Experts) for module in whole.modules())
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert similar(logits(whole).flatten(), logits(theirs).flatten(), dim=0) > 0.99


def test_a_bad_adapter_is_not_merged(pair: tuple[Any, Any]) -> None:
    ours = pair[0]
    before = {name: value.clone() for name, value in ours.state_dict().items() if value.dtype == torch.int8}
    next(iter(trained(ours).values())).data[0] = torch.nan
    with pytest.raises(NonFiniteWeightError, match="has NaN or infinity for"):
        ours.merge_and_unload(safe_merge=True)
    wrong = [name for name, value in before.items() if not torch.equal(ours.state_dict()[name], value)]
    assert len(wrong) <= 1  # PEFT merges one after the other


def test_copies(pair: tuple[Any, Any]) -> None:
    expected = logits(pair[0])
    assert torch.equal(logits(copy.deepcopy(pair[0])), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(pair[0]))), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(pair[0].unload()))), logits(pair[0].unload()))


def test_in_bf16_they_learn(checkpoints: CheckpointStore) -> None:
    folder, config = checkpoints.folder(ZOO["mixtral"], "bf16"), pyint8.Int8Config(experts=True)
    model = pyint8.load(folder, "cpu", config=config, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, lora())
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.02)
    losses = []
    for _ in range(8):
        output = model(TOKENS, labels=TOKENS)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert output.logits.dtype == torch.bfloat16
    assert losses[-1] < losses[0] - 0.1


def test_llama_4_is_refused_at_once(tmp_path: Path) -> None:
    randomise(build("llama4_text"), "llama4_text", outliers=False).to(torch.bfloat16).save_pretrained(tmp_path)
    model = pyint8.load(tmp_path, "cpu", config=pyint8.Int8Config(experts=True), dtype=torch.bfloat16)
    config = peft.LoraConfig(target_modules=[], target_parameters=["feed_forward.experts.down_proj"])
    with pytest.raises(ModelNotSupportedError, match="cannot name the int8 experts of Int8Llama4TextExperts"):
        peft.get_peft_model(model, config)


def test_a_bias_is_refused(checkpoints: CheckpointStore) -> None:
    """It would be without effect: updates are of what a weight multiplies."""
    model = pyint8.load(checkpoints.folder(ZOO["gpt_oss"], "bf16"), "cpu", config=pyint8.Int8Config(experts=True))
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj_bias"])
    with pytest.raises(ModelNotSupportedError, match=r"the weights of Int8GptOssExperts, .* not down_proj_bias"):
        peft.get_peft_model(model, config)


def test_a_single_expert_is_merged(tmp_path: Path) -> None:
    """Of which PEFT gives an update without a dimension of experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    one = transformers.MixtralConfig(
        num_hidden_layers=1, vocab_size=64, num_local_experts=1, num_experts_per_tok=1, **sizes
    )
    transformers.MixtralForCausalLM(one).save_pretrained(tmp_path)
    model = pyint8.load(tmp_path, "cpu", config=pyint8.Int8Config(experts=True), dtype=torch.float32)
    model = peft.get_peft_model(model, lora(init_lora_weights=False))
    adapted = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    assert (logits(model) - adapted).norm() < 0.1 * (base - adapted).norm()
