"""What is loaded is an ordinary model: everything that transformers, torch and PEFT (0.21.2) do with theirs works."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as tf
from collected import of_kinds
from oracle import (
    assert_same,
    compare_outputs,
    compare_reloaded,
    describe_tensor,
    differences,
    remains,
    show,
    state,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from zoo import PREQUANTIZED, ZOO

from pyint8.models.transformers.session import LoadSession
from pyint8.quantizer import Int8Quantizer
from pyint8.streaming.lane import Lane
from pyint8.streaming.stream import TensorStream

IDS = torch.tensor([[5, 6, 7, 8]])
Load = Callable[..., Any]


@pytest.mark.parametrize("checkpoint", ["bf16", PREQUANTIZED])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert_fresh_head"])
def test_saved_and_read_again(name: str, checkpoint: str, load: Load, tmp_path: Path) -> None:
    model = load(name, checkpoint, model=ZOO[name].cls)
    model.save_pretrained(tmp_path)
    found = compare_reloaded(model, tmp_path)
    assert not found, show(found)
    again, report = load(folder=tmp_path, model=type(model), return_report=True)
    assert not any(report.loading_info.values())
    assert report.tensors["pre-quantized"] > 0
    assert not differences(state(again), state(model))
    assert not compare_outputs(again, model, ZOO[name].inputs(model))


def test_nothing_of_pyint8_remains(load: Load) -> None:
    for name in ("llama", "gpt2", "mixtral", "t5"):
        assert remains(load(name)) == []


def test_the_report_is_not_needed(load: Load, tmp_path: Path) -> None:
    model, report = load(return_report=True)
    assert not hasattr(model, "load_report")
    del report
    gc.collect()
    assert model(IDS).logits.isfinite().all()
    model.save_pretrained(tmp_path)


def test_generate(load: Load, peer: Load) -> None:
    ours, theirs = load("gpt2"), peer("gpt2")
    for kwargs in ({}, {"num_beams": 2}, {"do_sample": True}):
        torch.manual_seed(0)
        mine = ours.generate(IDS, max_new_tokens=6, **kwargs)
        torch.manual_seed(0)
        assert torch.equal(mine, theirs.generate(IDS, max_new_tokens=6, **kwargs))
        assert mine.shape[1] > IDS.shape[1]


def test_pipeline(load: Load) -> None:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    pipe = tf.pipeline("text-generation", model=load(), tokenizer=tokenizer)
    ((answer,),) = pipe(["w5 w6 w7"], max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("w5 w6 w7")
    assert answer["generated_text"].count("w") > 3


def test_deepcopy(load: Load) -> None:
    model = load("gpt2")
    twin = copy.deepcopy(model)
    assert not differences(state(twin), state(model))
    pairs = list(zip(twin.parameters(), model.parameters(), strict=True))
    assert all(type(mine) is type(theirs) and mine.data_ptr() != theirs.data_ptr() for mine, theirs in pairs)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert not compare_outputs(twin, model, {"input_ids": IDS})
    assert remains(twin) == []


def test_state_dict_round_trip(load: Load) -> None:
    source, target = load(), load(checkpoint=PREQUANTIZED)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert not differences(state(target), state(source))
    assert not compare_outputs(target, source, {"input_ids": IDS})


def test_torch_save_of_the_state(load: Load) -> None:
    model = load()
    file = io.BytesIO()
    torch.save({name: tensor.data for name, tensor in model.state_dict().items()}, file)
    file.seek(0)
    target = load("llama", "fp16")
    target.load_state_dict(torch.load(file, weights_only=False))
    assert not differences(state(target), state(model))


def test_pickle_as_far_as_bitsandbytes_goes(load: Load, peer: Load) -> None:
    """Int8Params become Parameters, ours as the peer's; the model computes the same."""
    ours, theirs = pickle.loads(pickle.dumps(load())), pickle.loads(pickle.dumps(peer()))
    assert_same(ours, theirs)
    assert not compare_outputs(ours, load(), {"input_ids": IDS})


def test_lora_trains_the_adapter_alone(load: Load) -> None:
    model = load("gpt2", dtype=torch.float32)
    before = {name: describe_tensor(parameter.data)["bytes"] for name, parameter in model.named_parameters()}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=False)
    adapted = peft.get_peft_model(model, lora)
    layers = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.bnb.Linear8bitLt)]
    assert len(layers) == 4
    trained = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted.train()
    for _ in range(2):  # the first step moves B alone, which starts at zero
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(adapted.get_parameter(name), value) for name, value in trained.items())
    base = {name.replace(".base_layer", ""): p for name, p in adapted.get_base_model().named_parameters()}
    assert {name: describe_tensor(base[name].data)["bytes"] for name in before} == before


def test_resize_and_modes(load: Load) -> None:
    model = load()
    assert not model.training
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())
    model.resize_token_embeddings(140, mean_resizing=False)
    assert model(torch.tensor([[139, 5]])).logits.shape[-1] == 140
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)


def test_what_a_load_needed_goes_without_the_garbage_collector(load: Load) -> None:
    kinds = (LoadSession, TensorStream, Lane)
    gc.collect()
    before = of_kinds(kinds)  # the last failure of another test keeps what it was about
    gc.disable()
    try:
        models = [load(name) for name in ("llama", "gpt2", "mixtral")]
        left = of_kinds(kinds, but=before)
    finally:
        gc.enable()
    assert len(models) == 3
    assert left == []


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_collected_while_a_model_is_made(
    was_on: bool, fails: bool, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    preprocess = Int8Quantizer.preprocess_model

    def note(*args: Any, **kwargs: Any) -> None:
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("in between")
        preprocess(*args, **kwargs)

    monkeypatch.setattr(Int8Quantizer, "preprocess_model", note)
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="in between") if fails else nullcontext():
            load()
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
    assert seen == [False]
