"""Names of thousands of experts, renamed as transformers renames each of them, and in its order."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from pyint8.models.transformers import renaming
from pyint8.models.transformers.renaming import Renamer, in_loading_order

LEAVES = ("gate_proj.weight", "w1.weight", "w2.SCB", "fc1.weight", "down_proj.bias", "deep.experts.3.weight")
KEYS = [
    f"model.layers.{layer}.{block}.experts.{number}.{leaf}"
    for layer in (0, 11)
    for block in ("mlp", "block_sparse_moe")
    for number in (0, 1, 2, 9, 10, 11, 12, 20, 21, 99, 100, 101, 102, 211)
    for leaf in LEAVES
]
ODD = [
    WeightRenaming(r"experts\.(\d)\.", r"single.\1."),
    WeightRenaming(r"experts\.1(\d)\.", r"teens.\1."),
    WeightRenaming(r"experts\.(\d+)\.w1", r"numbered.w1.\1"),
    WeightRenaming(r"\.[0-4]\.w2", ".low.w2"),
    WeightRenaming(r"layers\.(\d+)\.", r"blocks.\1."),
    WeightRenaming(r"experts\.(\d)\d\.", r"tens.\1."),
    WeightRenaming(r"experts\.\d(\d)\.", r"ones.\1."),
]


def expected(key: str, conversions: list[Any]) -> tuple[str, str | None]:
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    return rename_source_key(key, renamings, converters)


def check(conversions: list[Any], keys: list[str]) -> None:
    renamer = Renamer(conversions, "model", {})
    for key in keys:
        renamed, _, _, pattern = renamer.resolve(key)
        assert (renamed, pattern) == expected(key, conversions)


@pytest.mark.parametrize("one", ODD, ids=lambda one: one.source_patterns[0])
def test_of_any_pattern(one: Any) -> None:
    check([one], KEYS)
    check([one], KEYS[::-1])


def test_of_every_architecture() -> None:
    mappings = (get_checkpoint_conversion_mapping(model_type) for model_type in tf.CONFIG_MAPPING)
    found = {repr(mapping): list(mapping) for mapping in mappings if mapping}
    assert len(found) > 50
    for conversions in found.values():
        check(conversions, KEYS)


def test_a_name_that_comes_twice_is_one() -> None:
    """As that of a weight does, for its scales."""
    check([], [key for key in KEYS for _ in range(2)])


def test_few_are_renamed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def rename(key: str, *others: Any) -> Any:
        asked.append(key)
        return rename_source_key(key, *others)

    monkeypatch.setattr(renaming, "rename_source_key", rename)
    keys = [f"model.layers.0.mlp.experts.{number}.gate_proj.weight" for number in range(128)]
    conversions = get_checkpoint_conversion_mapping("qwen3_moe")
    renamer = Renamer(conversions, "model", {})
    assert {renamer.resolve(key)[0] for key in keys} == {"model.layers.0.mlp.experts.gate_up_proj"}
    assert len(asked) <= 7  # two of each length of a number, and what they become


def test_the_order_is_transformers() -> None:
    names = [
        *KEYS,
        "experts.1.a",
        "a.experts",
        "experts",
        "a.experts.b2.experts.10.c",
        "a.experts.b10.experts.9.c",
        "1.a",
    ]
    assert in_loading_order(names) == sorted(names, key=dot_natural_key)
    names.reverse()
    assert in_loading_order(names) == sorted(names, key=dot_natural_key)
