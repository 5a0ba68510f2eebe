"""transformers' private names: the only file that uses them, so that a new release touches one file.

All of these came with 5.0 unless a comment says later. `pyint8.models.transformers.releases` says which releases are
known to work. Of the quantizer's hooks, which `hooks` overrides, `update_weight_conversions` came with 5.8 and
`update_parallel_plan` with 5.21; the others with 5.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations.accelerate import (
    _get_device_map as final_device_map,
)
from transformers.integrations.accelerate import (
    expand_device_map,
    infer_auto_device_map,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "AUTO_QUANTIZER_MAPPING",
    "CHANGED_WHILE_BUILDING",
    "Bnb8BitHfQuantizer",
    "Concatenate",
    "ConversionOps",
    "MergeModulelist",
    "QuantizationConfigMixin",
    "SkipParameters",
    "WeightConverter",
    "WeightRenaming",
    "WeightTransform",
    "converts_on_cpu",
    "custom_object_save",
    "dot_natural_key",
    "expand_device_map",
    "experts_implementation",
    "final_device_map",
    "fixed_dtypes",
    "for_other_names",
    "has_adapters",
    "ignored_on_save",
    "in_conversions",
    "infer_auto_device_map",
    "kept_in_fp32",
    "looks_at_values",
    "may_be_missing",
    "remove_tied_weights_from_state_dict",
    "rename_source_key",
    "renames_back",
    "renames_by_patterns",
    "reset_experts_implementation",
    "reverted",
    "revertible",
    "set_used_conversions",
    "should_convert_module",
    "tied_weights",
    "unsplit_modules",
]

# Of transformers, what has functions and flags that it replaces for as long as it builds a model.
CHANGED_WHILE_BUILDING = (modeling_utils, PreTrainedModel)


def fixed_dtypes(model: Any, dtype: torch.dtype, names: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Of parameters, by name, the dtypes that the model's class demands when it is loaded as `dtype`.

    Source: `_get_dtype_plan` (5.1) and how `convert_and_load_state_dict_in_model` uses it.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return {}
    pattern, group_names, _ = build_glob_alternation(list(plan))
    matches = {name: pattern.search(name) for name in names}
    return {name: plan[group_names[match.lastgroup]] for name, match in matches.items() if match is not None}


def kept_in_fp32(model: Any) -> list[str]:
    """Patterns of modules that stay in fp32 when the model is loaded as fp16."""
    return list(model._keep_in_fp32_modules or [])


def unsplit_modules(model: Any) -> list[str]:
    """Classes of modules that a device map keeps on one device."""
    return list(getattr(model, "_no_split_modules", None) or ())


def may_leave_parameters_out(model: Any) -> bool:
    """Whether transformers takes device maps of several devices that leave out what it places itself (Qwen 4)."""
    return getattr(model, "_no_placement_params", None) is not None


def tied_weights(model: Any) -> Mapping[str, str]:
    """Names of parameters to the name of the one whose memory they share."""
    ties: Mapping[str, str] = model.all_tied_weights_keys
    return ties


def looks_at_values(model: Any, missing: Collection[str]) -> bool:
    """Whether values may be looked at between the last parameter and the end of `from_pretrained`.

    transformers compares and pads what is tied, and lets a model's own code initialize it.

    Args:
        model: With all parameters set.
        missing: Names of what the checkpoint has no values for.
    """
    is_theirs = type(model).__module__.startswith("transformers.models.")
    return bool(missing) or bool(tied_weights(model)) or not is_theirs


def may_be_missing(model: Any, name: str) -> bool:
    """Whether the model can do without a parameter of its checkpoint."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def converts_on_cpu(converter: WeightConverter | None) -> bool:
    """Whether transformers converts on the CPU, to save a GPU's memory; releases before 5.16 never do."""
    return getattr(converter, "force_cpu", False)


def set_used_conversions(model: Any, used: list[WeightTransform]) -> None:
    """Says which renamings and conversions saving the model has to revert."""
    model._weight_conversions = used


def ignored_on_save(model: Any) -> list[str]:
    """Names in its state dict that are not saved."""
    return list(model._keys_to_ignore_on_save or ())


def has_adapters(model: Any) -> bool:
    """Whether adapters were added to it, of which alone save_pretrained then writes."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def revertible(model: Any, codes: Collection[str]) -> list[WeightTransform] | None:
    """Of the conversions that loaded the model, those to revert when it is saved; None if it was not loaded.

    Left out are those that would take int8 weights apart (`codes`, names of these and of their scales), and those that
    cannot be reverted: transformers' own for int8 checkpoints has no `reverse_op`.
    """
    used = getattr(model, "_weight_conversions", None)
    return None if used is None else [one for one in used if _is_revertible(one, codes)]


def _is_revertible(conversion: WeightTransform, codes: Collection[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return True
    try:
        return not in_conversions([conversion], codes)
    except NotImplementedError:
        return False


def for_other_names(one: WeightTransform, rename: Callable[[str], str]) -> WeightTransform:
    """A renaming, or a conversion, of tensors of other names, within the same part of a model (since 5.12)."""
    patterns = (one._original_source_patterns, one._original_target_patterns)
    sources, targets = ([rename(pattern) for pattern in each] for each in patterns)
    operations = [list(one.operations)] if isinstance(one, WeightConverter) else []
    made: WeightTransform = type(one)(sources, targets, *operations)
    for name in ("scope_prefix", "base_model_prefix"):
        if hasattr(one, name):
            setattr(made, name, getattr(one, name))
    return made


def renames_by_patterns(one: WeightTransform) -> bool:
    """Whether it renames as its class's base does, by its patterns alone."""
    return type(one).rename_source_key is WeightTransform.rename_source_key


def renames_back(one: WeightTransform, names: Iterable[str]) -> bool:
    """Whether it is a plain renaming, and saving a model reverts it for one of these names."""
    if type(one) is not WeightRenaming:
        return False
    reverse = one.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in names)


def in_conversions(conversions: Iterable[WeightTransform], names: Iterable[str]) -> set[str]:
    """Of names in a model's state dict, those of tensors that reverting the conversions takes apart or merges."""
    reverse = [one.reverse_transform() for one in conversions if isinstance(one, WeightConverter)]
    return {name for name in names if rename_source_key(name, [], reverse)[1] is not None}


def reverted(
    model: Any, state: dict[str, torch.Tensor], conversions: list[WeightTransform] | None
) -> dict[str, torch.Tensor]:
    """The state dict with these conversions reverted, as `save_pretrained` does."""
    used = getattr(model, "_weight_conversions", None)
    model._weight_conversions = conversions
    try:
        return revert_weight_conversion(model, state)  # type: ignore[no-any-return]
    finally:
        model._weight_conversions = used


def experts_implementation(config: Any) -> Any:
    """What a configuration names as its model's implementation of experts; None if it names none."""
    return getattr(config, "_experts_implementation", None)


def reset_experts_implementation(model: Any, name: str) -> None:
    """Gives a model that was to use the implementation of experts `name` that of a model that names none."""
    if model.config._experts_implementation == name:
        model.config._experts_implementation = model.get_correct_experts_implementation(None)
