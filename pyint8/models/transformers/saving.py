"""A transformers model's int8 checkpoint: what `save_pretrained` writes, without its limits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from pyint8.checkpoint.shards import shards_of
from pyint8.errors import ModelNotSupportedError, OptionError
from pyint8.models.checks import FORMAT, SCALES
from pyint8.models.saving import in_memory, planned, write_shards
from pyint8.models.transformers.compat import (
    WeightConverter,
    WeightTransform,
    custom_object_save,
    has_adapters,
    ignored_on_save,
    in_conversions,
    remove_tied_weights_from_state_dict,
    reverted,
    revertible,
)
from pyint8.models.transformers.fusion import is_plain_merge
from pyint8.quantizer import EXPERT_SCALES, expert_scales, int8_modules, require_codes

State = dict[str, torch.Tensor]


def save_model(
    model: Any, folder: str, max_shard_size: int | str, *, checksums: bool, fused_experts: bool = False
) -> None:
    """Writes a model's weights and configurations to an empty folder.

    A single file is that of `save_pretrained`, to the byte; which needs a file's tensors in host memory, cannot save
    what transformers loaded from int8, and splits int8 weights so that nothing can read them.

    Args:
        model: An int8 model.
        folder: Where to.
        max_shard_size: Of one file.
        checksums: Whether to write those of all tensors.
        fused_experts: Whether the int8 experts of a module are one tensor (see `revertible_int8`).

    Raises:
        ModelNotSupportedError: It is not int8, or has adapters.
        OptionError: `fused_experts`, and no experts are int8.
        WriteError: The operating system refused.
    """
    require_saveable(model)
    if fused_experts:
        require_experts(model)
    own = model.state_dict()
    values = {id(value): name for name, value in own.items()}
    tensors = saved_form(model, own, partial(in_memory, model), fused_experts=fused_experts)
    shards = shards_of((planned(name, tensor) for name, tensor in tensors.items()), max_shard_size)

    def value(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return in_memory(model, values.get(id(tensor), name), tensor)

    write_shards(folder, shards, value, {"total_parameters": model.num_parameters()}, checksums=checksums)
    write_description(model, folder)


def require_saveable(model: Any) -> None:
    """Raises ModelNotSupportedError for a model that is not int8, or has adapters."""
    if has_adapters(model):
        raise ModelNotSupportedError(
            "the model has adapters: save those with model.save_pretrained(folder), and the model without them"
        )
    require_codes(model)
    stored = getattr(model.config, "quantization_config", None)
    if stored is None:
        raise ModelNotSupportedError(
            "its configuration does not say that it is int8 (no quantization_config), so what is saved could not be "
            "loaded; load the model with pyint8.load, or transformers and load_in_8bit"
        )


def require_experts(model: Any) -> None:
    """Raises OptionError for a model without int8 experts, which nothing can fuse."""
    if not expert_scales(model):
        raise OptionError(
            f"fused_experts is for int8 experts, and this {type(model).__name__} has none: leave it out, or make some "
            "with config=Int8Config(experts=True)"
        )


def saved_form(
    model: Any, state: State, fetch: Callable[[str, torch.Tensor], torch.Tensor], *, fused_experts: bool
) -> State:
    """The state dict as a checkpoint has it: tied weights once, by the checkpoint's names and in its parts.

    Args:
        model: For its conversions.
        state: Its state dict.
        fetch: The value of a tensor that a conversion takes apart, by its name and what `state` has for it.
        fused_experts: See `revertible_int8`.
    """
    ignored = ignored_on_save(model)
    modules = int8_modules(model)
    companions = {f"{name}.{leaf}" for name in modules for leaf in (SCALES, FORMAT)}
    of_experts = expert_scales(model)
    companions |= set(of_experts)
    single = remove_tied_weights_from_state_dict(
        {name: value for name, value in state.items() if name not in companions and name not in ignored}, model
    )
    codes = [name for name in modules if f"{name}.weight" in single]
    belonging = {f"{name}.{leaf}" for name in codes for leaf in ("weight", SCALES, FORMAT)}
    ordered = {name: single.get(name, state[name]) for name in state if name in single or name in belonging}
    conversions = revertible_int8(model, belonging, fused_experts=fused_experts)
    for name in in_conversions(conversions or (), ordered):
        ordered[name] = fetch(name, ordered[name])
    scales = {name: fetch(name, state[name]) for name in of_experts}
    return reverted(model, ordered, conversions) | scales_as_saved(model, scales, conversions)


def revertible_int8(model: Any, belonging: Collection[str], *, fused_experts: bool) -> list[WeightTransform] | None:
    """The conversions to revert (see `revertible`).

    int8 experts that the model's own conversions only put side by side are taken apart, unless `fused_experts`. All
    others stay whole: codes int8 [experts, out, in] and scales fp32 [experts, out].
    """
    experts = {name.removesuffix(EXPERT_SCALES) for name in expert_scales(model)}
    conversions = revertible(model, ()) or []
    odd = [one for one in conversions if isinstance(one, WeightConverter) and not is_plain_merge(one)]
    return revertible(model, {*belonging, *(experts if fused_experts else in_conversions(odd, experts))})


def scales_as_saved(model: Any, scales: State, conversions: Any) -> State:
    """The scales of experts, named as in the model, as a checkpoint has them: taken apart as their weights are."""
    saved: State = {}
    as_weights = {name.removesuffix(EXPERT_SCALES): value.unsqueeze(-1) for name, value in scales.items()}
    for name, value in reverted(model, as_weights, conversions).items():
        owner, _, leaf = name.rpartition(".")
        saved[f"{owner}.{SCALES}" if leaf == "weight" else f"{name}{EXPERT_SCALES}"] = value.squeeze(-1)
    return saved


def write_description(model: Any, folder: str) -> None:
    """Writes configuration, generation configuration and, for code that is not transformers', the code."""
    config = _config_of(model)
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def description(model: Any) -> list[dict[str, Any]]:
    """What `write_description` says of a model, in whatever folder its checkpoint lies."""
    said = [_config_of(model).to_diff_dict()]
    if model.can_generate():
        said.append(model.generation_config.to_diff_dict())
    return [_unnamed(each) for each in said]


def _unnamed(said: Any) -> Any:
    if not isinstance(said, dict):
        return said
    return {name: _unnamed(value) for name, value in said.items() if name != "_name_or_path"}


def _config_of(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    return config
