"""`pyint8.reload` of models in use: generating, compiled, hooked, dispatched, adapted, tied."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from oracle import state
from peft import LoraConfig, prepare_model_for_kbit_training
from reloads import CPU, LLAMA, adapted, changed, logits, spoil
from torch import nn
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.errors import CheckpointError, ModelNotSupportedError, PlacementError

pytestmark = pytest.mark.slow


def generated(model: Any) -> list[int]:
    ids = LLAMA.inputs(model)["input_ids"][:1]
    tokens: list[int] = model.generate(ids, max_new_tokens=12, do_sample=False).tolist()
    return tokens


def test_a_generation_loop(old: Path, new: Path) -> None:
    model = pyint8.load(old, CPU)
    expected = {path: generated(pyint8.load(path, CPU)) for path in (old, new)}
    assert expected[old] != expected[new]
    for path in (old, new, new, old, new):
        pyint8.reload(model, path)
        assert generated(model) == expected[path]


def test_compiled_forwards(old: Path, new: Path) -> None:
    expected = logits(pyint8.load(new, CPU))
    model = pyint8.load(old, CPU)
    compiled: Any = torch.compile(model, backend="eager")
    assert not torch.equal(logits(compiled), expected)
    pyint8.reload(compiled, new)
    assert torch.equal(logits(compiled), expected)
    assert torch.equal(logits(model), expected)


def test_modules_that_are_compiled(old: Path, new: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.compile(backend="eager")
    logits(model)
    pyint8.reload(model, new)
    assert torch.equal(logits(model), logits(pyint8.load(new, CPU)))


@pytest.mark.parametrize("used", [False, True])
def test_copies(used: bool, old: Path, new: Path) -> None:
    model = pyint8.load(old, CPU)
    if used:
        logits(model)
    other = copy.deepcopy(model)
    pyint8.reload(other, new)
    assert state(other) == state(pyint8.load(new, CPU))
    assert torch.equal(logits(other), logits(pyint8.load(new, CPU)))
    assert state(model) == state(pyint8.load(old, CPU))


def test_models_in_training(old: Path, new: Path) -> None:
    """bitsandbytes computes in another way then."""
    model = pyint8.load(old, CPU).train()
    logits(model)
    pyint8.reload(model, new)
    assert model.training
    assert torch.equal(logits(model), logits(pyint8.load(new, CPU).train()))


def test_hooks_stay(old: Path, new: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    seen: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(lambda *given: seen.append(given[2]))
    logits(model)
    pyint8.reload(model, new)
    logits(model)
    fresh: Any = pyint8.load(new, CPU)
    fresh.model.layers[1].register_forward_hook(lambda *given: seen.append(given[2]))
    logits(fresh)
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers(wrap: Any, old: Path, new: Path) -> None:
    model = pyint8.load(old, CPU)
    pyint8.reload(wrap(model), new)
    assert state(model) == state(pyint8.load(new, CPU))


def test_dispatched_modules(old: Path, new: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    logits(model)
    pyint8.reload(model, new)
    assert hasattr(model.lm_head, "_hf_hook")
    assert torch.equal(logits(model), logits(pyint8.load(new, CPU)))


def test_what_accelerate_keeps_in_host_memory(old: Path, new: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    cpu_offload(model.lm_head)
    assert model.lm_head.weight.is_meta
    pyint8.reload(model, new)
    assert model.lm_head.weight.is_meta
    assert torch.equal(logits(model), logits(pyint8.load(new, CPU)))


def test_what_is_on_the_disk_is_named(old: Path, new: Path, tmp_path: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    embedding = model.model.embed_tokens.weight.clone()
    disk_offload(model.lm_head, tmp_path / "offload")
    with pytest.raises(PlacementError, match=r"lm_head.*, where accelerate reads it"):
        pyint8.reload(model, new)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_models_that_were_made_in_inference_mode(old: Path, new: Path) -> None:
    with torch.inference_mode():
        model = pyint8.load(old, CPU)
    pyint8.reload(model, new)
    assert state(model) == state(pyint8.load(new, CPU))


def test_a_backward_pass_does_not_mix_two_checkpoints(old: Path, new: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    scale = model.model.norm.weight.requires_grad_()
    loss = model(**LLAMA.inputs(model)).logits.float().sum()
    pyint8.reload(model, new)
    assert scale.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_random_numbers_of_the_caller_are_left_alone(checkpoints: CheckpointStore) -> None:
    zoo_model = ZOO["bert_fresh_head"]
    model = pyint8.load(checkpoints.folder(zoo_model, "bf16"), CPU, model=zoo_model.cls)
    before = torch.get_rng_state()
    pyint8.reload(model, checkpoints.folder(zoo_model, "bf16"), strict=False)
    assert torch.equal(torch.get_rng_state(), before)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=repr)
def test_adapters_stay(more: dict[str, Any], old: Path, new: Path) -> None:
    model, expected = adapted(pyint8.load(old, CPU), **more), adapted(pyint8.load(new, CPU), **more)
    if more:  # what an adapter made of the old model stays
        own = {name: value for name, value in model.state_dict().items() if "lora" in name or "to_save" in name}
        expected.load_state_dict(own, strict=False)
    logits(model)
    pyint8.reload(model, new)
    assert state(model).keys() == state(expected).keys()
    assert torch.equal(logits(model), logits(expected))


def test_adapters_that_were_added(old: Path, new: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    pyint8.reload(model, new)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(pyint8.load(new, CPU)))


def test_models_prepared_for_training(old: Path, new: Path) -> None:
    model = prepare_model_for_kbit_training(pyint8.load(old, CPU))
    expected = prepare_model_for_kbit_training(pyint8.load(new, CPU))
    pyint8.reload(adapted(model), new)
    assert torch.equal(logits(model), logits(adapted(expected)))


def test_merged_adapters_are_refused(old: Path, new: Path) -> None:
    model = adapted(pyint8.load(old, CPU))
    model.merge_adapter()
    with pytest.raises(ModelNotSupportedError, match="merged into"):
        pyint8.reload(model, new)


# --- ties -------------------------------------------------------------------------------------------------------------


def with_a_head(source: Path, folder: Path, more: float) -> Path:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + more

    return changed(source, folder, add)


@pytest.mark.parametrize("had", [None, 0, 1])
@pytest.mark.parametrize("has", [None, 0, 1])
def test_a_tied_head(had: int | None, has: int | None, checkpoints: CheckpointStore, tmp_path: Path) -> None:
    plain = checkpoints.folder(ZOO["llama_tied"], "bf16")
    old, new = (
        plain if more is None else with_a_head(plain, tmp_path / name, more)
        for name, more in (("old", had), ("new", has))
    )
    model: Any = pyint8.load(old, CPU)
    spoil(model)
    if has == 1 and had != 1:
        with pytest.raises(CheckpointError, match="tied"):
            pyint8.reload(model, new)
        assert bool((model.lm_head.weight == 1).all())
        return
    pyint8.reload(model, new)
    expected: Any = pyint8.load(new, CPU)
    assert state(model) == state(expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (had != 1)
