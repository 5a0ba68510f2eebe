"""pyint8.load(path, model=module): int8 checkpoints, device maps, and what is refused before the module is touched."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import ALL, IDS, INT8, Net, assert_same, by_hand, drawn, on_meta, saved
from safetensors.torch import load_file, save_file
from torch import nn

import pyint8
from pyint8 import Int8Config
from pyint8.errors import OptionError, PlacementError, Pyint8Error, QuantizationStateError

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("start", ["meta", "values"])
def test_an_int8_checkpoint(start: str, tmp_path: Path) -> None:
    theirs = by_hand(drawn(Net()), INT8)
    folder = saved(tmp_path, theirs)
    ours, report = pyint8.load(folder, "cpu", model=on_meta() if start == "meta" else Net().eval(), return_report=True)
    assert_same(ours, theirs)
    assert report.tensors["pre-quantized"] == len(INT8)
    assert not any(report.loading_info.values())
    with torch.no_grad():
        assert torch.equal(ours(IDS), theirs(IDS))


def test_an_int8_head_is_never_taken_for_floats(tmp_path: Path) -> None:
    """By default the head is left alone; if the checkpoint has it in int8, that is no value for an ordinary Linear."""
    theirs = by_hand(drawn(Net()), [*INT8, "head"])
    folder = saved(tmp_path, theirs)
    assert_same(pyint8.load(folder, "cpu", model=on_meta(), config=ALL), theirs)
    with suppress(QuantizationStateError):
        assert_same(pyint8.load(folder, "cpu", model=on_meta()), theirs)


def damaged(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Put or remove tensors of blocks.0.mlp.0."""
    found = load_file(folder / "model.safetensors")
    for leaf, tensor in tensors.items():
        found.pop(f"blocks.0.mlp.0.{leaf}", None)
        if tensor is not None:
            found[f"blocks.0.mlp.0.{leaf}"] = tensor
    save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"SCB": None}, "without its scales"),
        ({"SCB": torch.ones(47)}, "SCB"),
        ({"SCB": torch.ones(48, 1)}, "SCB"),
        ({"SCB": torch.ones(48, dtype=torch.float16)}, "SCB"),
        ({"weight": torch.ones(48, 32)}, "must be int8"),
        ({"weight": torch.ones(48, 32, dtype=torch.uint8)}, "must be int8"),
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "format 0"),
        ({"weight": None}, "which the checkpoint does not have"),
    ],
    ids=["no SCB", "SCB short", "SCB 2-D", "SCB fp16", "weight fp32", "weight uint8", "format 1", "no weight"],
)
def test_a_broken_int8_weight_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = damaged(saved(tmp_path, by_hand(drawn(Net()), INT8)), **change)
    with pytest.raises(QuantizationStateError, match=says) as caught:
        pyint8.load(folder, "cpu", model=Net())
    assert str(caught.value.tensor).startswith("blocks.0.mlp.0.")
    assert caught.value.path == str(folder / "model.safetensors")


def test_int8_without_any_scales_is_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in by_hand(drawn(Net()), INT8).state_dict().items()}
    save_file({name: tensor for name, tensor in tensors.items() if "SCB" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(QuantizationStateError, match="SCB"):
        pyint8.load(tmp_path, "cpu", model=Net())


def test_floats_in_an_int8_checkpoint_stay_floats(tmp_path: Path) -> None:
    some = INT8[:3]
    theirs = by_hand(drawn(Net()), some)
    ours, report = pyint8.load(saved(tmp_path, theirs), "cpu", model=on_meta(), config=ALL, return_report=True)
    kept = {*INT8[3:], "head"}
    assert report.skipped == {**dict.fromkeys(kept, "it is not quantized in the checkpoint"), "embed": "an embedding"}
    assert_same_values(ours, theirs)


def assert_same_values(ours: nn.Module, theirs: nn.Module) -> None:
    """Whatever the layout: a Conv1D that stays one keeps its own."""
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in reference.items())


# --- placement --------------------------------------------------------------------------------------------------------

CPU_MAPS: list[Any] = [
    "cpu",
    None,
    "auto",
    "balanced",
    "sequential",
    torch.device("cpu"),
    {"": "cpu"},
    {"embed": "cpu", "blocks.0": torch.device("cpu"), "blocks.1": "cpu", "norm": "cpu", "head": "cpu", "": "cpu"},
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, None and auto mean it")
@pytest.mark.parametrize("device_map", CPU_MAPS, ids=str)
def test_every_way_to_say_cpu(device_map: Any, tmp_path: Path) -> None:
    source = drawn(Net())
    ours = pyint8.load(saved(tmp_path, source), device_map, model=on_meta(), dtype=torch.float16)
    theirs = by_hand(source, INT8)
    assert_same(ours, theirs)
    with torch.no_grad():
        assert torch.equal(ours(IDS), theirs(IDS))


REFUSED: list[tuple[dict[str, Any], type[Pyint8Error], str]] = [
    ({"device_map": "nonsense"}, PlacementError, "device_map is 'nonsense'; it must be one of auto, balanced,"),
    ({"device_map": 3.5}, PlacementError, "device_map is 3.5; it must be one of auto"),
    ({"device_map": True}, PlacementError, "device_map is True; it must be one of auto"),
    ({"device_map": {"embed": "cpu", "blocks": "cpu"}}, PlacementError, "no entry for norm.weight, norm.bias"),
    ({"device_map": {"": "nonsense"}}, PlacementError, "nonsense"),
    ({"device_map": {"": "cpu", "blocks.1": "disk"}}, PlacementError, r"Int8Config\(fp32_cpu_offload=True\)"),
    ({"dtype": "nonsense"}, OptionError, "dtype is 'nonsense'; it must be a floating torch.dtype, the name of one"),
    ({"dtype": 5}, OptionError, "dtype is 5; it must be a floating torch.dtype"),
]


@pytest.mark.parametrize(("wrong", "kind", "says"), REFUSED, ids=[str(wrong) for wrong, _, _ in REFUSED])
def test_nonsense_is_refused(wrong: dict[str, Any], kind: type[Pyint8Error], says: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=says):
        pyint8.load(saved(tmp_path, drawn(Net())), **{"device_map": "cpu"} | wrong, model=Net())


@pytest.mark.parametrize("wrong", [{"device_map": "nonsense"}, {"device_map": {"embed": "cpu"}}, {"dtype": 5}], ids=str)
def test_what_is_refused_leaves_the_module_alone(wrong: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, drawn(Net()))
    module = Net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(Pyint8Error):
        pyint8.load(folder, **{"device_map": "cpu"} | wrong, model=module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(not after[name].is_meta and torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_written_to_the_disk_needs_a_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path, drawn(Net()), "head.weight")
    offload = Int8Config(fp32_cpu_offload=True)
    with pytest.raises(PlacementError, match=r'puts head.weight on "disk"; say where with offload_folder='):
        pyint8.load(folder, {"": "cpu", "head": "disk"}, model=Net(), config=offload)


def in_pickles(tmp_path: Path, module: nn.Module) -> Path:
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("form", [saved, in_pickles])
def test_offloaded_modules_compute_what_they_would_in_place(form: Any, dtype: Any, tmp_path: Path) -> None:
    source = drawn(Net())
    ours, report = pyint8.load(
        form(tmp_path, source),
        {"": "cpu", "blocks.1": "disk"},
        model=Net().eval(),
        dtype=dtype,
        config=Int8Config(fp32_cpu_offload=True),
        offload_folder=tmp_path / "offload",
        return_report=True,
    )
    written = list((tmp_path / "offload").glob("*.dat"))
    parameters = list(source.blocks[1].parameters())
    if form is saved:  # safetensors are read where they are
        assert not written
        assert report.tensors["left on disk"] == len(parameters)
        assert report.checkpoint_bytes == sum(t.nbytes for n, t in source.state_dict().items() if "blocks.1" not in n)
    else:
        assert len(written) == len(parameters)
    reference = source if dtype == "auto" else source.to(dtype)
    with torch.no_grad():
        assert torch.equal(ours(IDS), reference(IDS))


def test_tied_weights_go_to_the_disk_together(tmp_path: Path) -> None:
    source = drawn(Net(tied=True))
    ours = pyint8.load(
        saved(tmp_path, source),
        {"": "cpu", "head": "disk", "embed": "disk"},
        model=Net(tied=True).eval(),
        dtype=torch.float32,
        config=Int8Config(fp32_cpu_offload=True, skip_modules=["blocks", "head"]),
        offload_folder=tmp_path / "offload",
    )
    with torch.no_grad():
        assert torch.equal(ours(IDS), source(IDS))
