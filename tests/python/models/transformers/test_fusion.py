"""Where the sources of a merge lie in what it makes: as the model's own converter puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from pyint8.checkpoint import Checkpoint, open_checkpoint
from pyint8.models.transformers.fusion import expert_parts, find_parts
from pyint8.models.transformers.plan import Target

GATE, UP, DOWN = "experts.*.gate.weight", "experts.*.up.weight", "experts.*.down.weight"
BOTH = WeightConverter([GATE, UP], "experts.gate_up", [MergeModulelist(dim=0), Concatenate(dim=1)])
KINDS = ("gate", "up")
ONE = WeightConverter(DOWN, "experts.down", [MergeModulelist(dim=0)])


def experts(folder: Path, shapes: dict[str, tuple[int, ...]], count: int = 12, **dtypes: torch.dtype) -> Checkpoint:
    tensors = {
        f"experts.{number}.{kind}.weight": torch.randn(shape).to(dtypes.get(kind, torch.bfloat16))
        for kind, shape in shapes.items()
        for number in range(count)
    }
    save_file(tensors, folder / "x.safetensors")
    return open_checkpoint(folder / "x.safetensors")


def target_of(checkpoint: Checkpoint, converter: WeightConverter, name: str) -> Target:
    """In the order of transformers' loop: numbers count as numbers."""
    sources = sorted(checkpoint, key=lambda key: (int(key.split(".")[1]), key))
    return Target(name, [(key, f"experts.*.{key.split('.')[2]}.weight") for key in sources], converter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("converter", "name", "shapes"),
    [
        (BOTH, "experts.gate_up", {"gate": (6, 5), "up": (6, 5)}),
        (BOTH, "experts.gate_up", {"gate": (6, 5), "up": (3, 5)}),
        (ONE, "experts.down", {"down": (5, 6)}),
        (ONE, "experts.down", {"down": (7,)}),
    ],
    ids=["even", "uneven", "one", "vectors"],
)
def test_parts_are_where_the_converter_puts_them(
    tmp_path: Path, converter: WeightConverter, name: str, shapes: dict[str, Any], dtype: torch.dtype
) -> None:
    checkpoint = experts(tmp_path, shapes)
    target = target_of(checkpoint, converter, name)
    values = {key: torch.rand(checkpoint[key].torch_shape) for key in checkpoint}
    collected: dict[str, list[torch.Tensor]] = {}
    for key, pattern in target.sources:
        assert pattern is not None
        collected.setdefault(pattern, []).append(values[key])
    for operation in converter.operations:
        collected = operation.convert(
            collected, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
        )
    (expected,) = collected.values()
    assert isinstance(expected, torch.Tensor)
    parts = find_parts(target, checkpoint, dtype)
    assert parts.keys() == values.keys()
    assert {part.shape for part in parts.values()} == {tuple(expected.shape)}
    assert {part.name for part in parts.values()} == {name}
    found = torch.full(expected.shape, torch.nan)
    for key, part in parts.items():
        found.view(-1)[part.offset : part.offset + values[key].numel()] = values[key].view(-1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "operations",
    [
        [MergeModulelist(dim=1)],
        [MergeModulelist(dim=0), Transpose(1, 2)],
        [Concatenate(dim=0)],
        [Chunk(dim=0)],
        [MergeModulelist(dim=0), MergeModulelist(dim=0)],
    ],
    ids=lambda operations: "-".join(type(each).__name__ for each in operations),
)
def test_what_does_more_than_stack_is_left_to_the_converter(tmp_path: Path, operations: list[Any]) -> None:
    checkpoint = experts(tmp_path, {"down": (5, 6)})
    converter = WeightConverter(DOWN, "experts.down", operations)
    assert find_parts(target_of(checkpoint, converter, "experts.down"), checkpoint, torch.bfloat16) == {}


def test_what_does_not_fit_together_is_left_to_the_converter(tmp_path: Path) -> None:
    def parts(name: str, shapes: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **more: Any) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        checkpoint = experts(folder, shapes, **more)
        return find_parts(target_of(checkpoint, BOTH, "experts.gate_up"), checkpoint, dtype)

    assert parts("columns", {"gate": (6, 5), "up": (6, 4)}) == {}
    assert parts("mixed", {"gate": (6, 5), "up": (6, 5)}, up=torch.float32) == {}
    assert parts("double", {"gate": (6, 5), "up": (6, 5)}, gate=torch.float64, up=torch.float64) == {}
    assert parts("absent", {"gate": (6, 5)}) == {}
    assert parts("none", {"gate": (6, 5), "up": (6, 5)}) != {}


def test_an_expert_that_is_missing_is_left_to_the_converter(tmp_path: Path) -> None:
    checkpoint = experts(tmp_path, {"gate": (6, 5), "up": (6, 5)})
    target = target_of(checkpoint, BOTH, "experts.gate_up")
    del target.sources[3]
    assert find_parts(target, checkpoint, torch.bfloat16) == {}


def test_no_converter_no_parts(tmp_path: Path) -> None:
    checkpoint = experts(tmp_path, {"down": (5, 6)}, count=1)
    assert find_parts(Target("x", [("experts.0.down.weight", None)]), checkpoint, torch.bfloat16) == {}


@pytest.mark.parametrize("up_rows", [6, 3])
def test_parts_of_int8_experts_come_as_they_will_lie_in_memory(tmp_path: Path, up_rows: int) -> None:
    checkpoint = experts(tmp_path, {"gate": (6, 5), "up": (up_rows, 5)})
    target = target_of(checkpoint, BOTH, "experts.gate_up")
    parts = expert_parts(target, checkpoint, (12, 6 + up_rows, 5), transposed=False)
    assert [part.entry.name for part in parts] == [f"experts.{n}.{kind}.weight" for n in range(12) for kind in KINDS]
    assert [(part.expert, part.row) for part in parts] == [(n, row) for n in range(12) for row in (0, 6)]
