"""`pyint8.reload` of modules of one's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from plain_models import ALL, IDS, INT8, Net, drawn
from safetensors.torch import save_file, save_model
from torch import nn

import pyint8
from pyint8.errors import (
    CheckpointError,
    FileChangedError,
    ModelNotSupportedError,
    NonFiniteWeightError,
    OptionError,
    PartlyReplacedError,
    Pyint8Error,
    QuantizationStateError,
    ShapeMismatchError,
)
from pyint8.models import replacing
from pyint8.models.live import Place


def other(**kwargs: Any) -> nn.Module:
    """Values that are not those of `drawn`."""
    net = drawn(Net(**kwargs))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(-0.7)
        net.get_buffer("shift").add_(1)
        net.get_buffer("calls").add_(5)
    return net


def file_of(net: nn.Module, path: Path) -> Path:
    save_model(net, str(path))
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return file_of(drawn(Net()), tmp_path / "old.safetensors")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return file_of(other(), tmp_path / "new.safetensors")


def filled(path: Path, **options: Any) -> Net:
    return pyint8.load(path, "cpu", model=Net().eval(), **options)


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    one, two = values(ours), values(theirs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with torch.no_grad():
        assert torch.equal(ours(IDS), theirs(IDS))


def addresses(net: nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in net.state_dict().items() if not name.endswith("weight_format")}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("config", [None, ALL])
def test_16_bit(old: Path, new: Path, config: Any, used: bool) -> None:
    net = filled(old, config=config)
    if used:
        net(IDS)
    before = addresses(net)
    report = pyint8.reload(net, new)
    assert addresses(net) == before
    assert report.tensors["int8"] == len(INT8) + (config is ALL)
    assert report.checkpoint_bytes == sum(value.nbytes for value in other().state_dict().values())
    assert_equal(net, filled(new, config=config))


def test_int8(old: Path, new: Path, tmp_path: Path) -> None:
    pyint8.save(filled(new), tmp_path / "int8")
    net = filled(old)
    report = pyint8.reload(net, tmp_path / "int8")
    assert report.tensors["pre-quantized"] == len(INT8)
    assert_equal(net, filled(new))


def test_a_module_s_own_dtypes_stay(old: Path, new: Path) -> None:
    net = filled(old, dtype=torch.bfloat16)
    pyint8.reload(net, new)
    assert net.norm.weight.dtype == torch.bfloat16
    assert torch.equal(net.norm.weight, other().get_parameter("norm.weight").to(torch.bfloat16))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers(old: Path, new: Path, wrap: Any) -> None:
    net = filled(old)
    pyint8.reload(wrap(net), new)
    assert_equal(net, filled(new))


def test_ties(tmp_path: Path) -> None:
    old, new = (
        file_of(net, tmp_path / name) for name, net in (("old", drawn(Net(tied=True))), ("new", other(tied=True)))
    )
    net = pyint8.load(old, "cpu", model=Net(tied=True).eval())
    pyint8.reload(net, new)
    assert net.head.weight is net.embed.weight
    assert_equal(net, pyint8.load(new, "cpu", model=Net(tied=True).eval()))


@pytest.mark.parametrize("alike", [True, False])
def test_a_tie_that_the_checkpoint_has_twice(tmp_path: Path, alike: bool) -> None:
    old = file_of(drawn(Net(tied=True)), tmp_path / "old.safetensors")
    net = pyint8.load(old, "cpu", model=Net(tied=True).eval())
    tensors = {name: value.clone() for name, value in other(tied=True).state_dict().items()}
    tensors["head.weight"] += 0 if alike else 1
    save_file(tensors, tmp_path / "new.safetensors")
    if alike:
        pyint8.reload(net, tmp_path / "new.safetensors")
        assert torch.equal(net.head.weight, tensors["embed.weight"])
    else:
        with pytest.raises(CheckpointError, match="tied to"):
            pyint8.reload(net, tmp_path / "new.safetensors")


def test_what_accelerate_keeps_in_host_memory(old: Path, new: Path) -> None:
    net = filled(old)
    cpu_offload(net.embed)
    pyint8.reload(net, new)
    assert net.embed.weight.is_meta
    with torch.no_grad():
        assert torch.equal(net(IDS), filled(new)(IDS))


def test_computed_buffers_stay(old: Path, new: Path) -> None:
    net = filled(old)
    net.register_buffer("mine", torch.ones(3), persistent=False)
    pyint8.reload(net, new)
    assert torch.equal(net.get_buffer("mine"), torch.ones(3))


# --- refusals ---------------------------------------------------------------------------------------------------------


def changed(path: Path, **tensors: torch.Tensor | None) -> Path:
    own = {name: value.clone() for name, value in other().state_dict().items()} | tensors
    save_file({name: value for name, value in own.items() if value is not None}, path)
    return path


def refused(net: nn.Module, path: Path, kind: type[Pyint8Error], words: str) -> Pyint8Error:
    before = values(net)
    with pytest.raises(kind, match=words) as raised:
        pyint8.reload(net, path)
    assert not isinstance(raised.value, PartlyReplacedError)
    assert all(torch.equal(value, before[name]) for name, value in values(net).items())
    return raised.value


def test_what_is_missing(old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = changed(tmp_path / "new.safetensors", **{"norm.bias": None, "shift": None})
    net = filled(old)
    refused(net, new, CheckpointError, "no values for norm.bias, shift")
    pyint8.reload(net, new, strict=False)
    assert "left as they are: norm.bias, shift" in caplog.text
    assert torch.equal(net.norm.bias, drawn(Net()).get_parameter("norm.bias"))
    assert torch.equal(net.head.weight, other().get_parameter("head.weight"))


def test_what_is_unexpected(old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = pyint8.reload(filled(old), changed(tmp_path / "new.safetensors", more=torch.zeros(2)))
    assert report.loading_info == {"missing_keys": set(), "unexpected_keys": {"more"}}
    assert "the checkpoint's more have no place" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "kind", "words"),
    [
        ({"blocks.0.mlp.0.weight": torch.zeros(48, 31)}, ShapeMismatchError, "needs"),
        ({"blocks.0.attn.weight": torch.zeros(31, 32)}, ShapeMismatchError, "needs"),
        ({"norm.bias": torch.zeros(31)}, ShapeMismatchError, "needs"),
        ({"blocks.0.mlp.0.weight": torch.zeros(48, 32, dtype=torch.int8)}, QuantizationStateError, "int8 weight"),
        ({"norm.bias": torch.zeros(32, dtype=torch.int32)}, CheckpointError, "its dtype is I32"),
        ({"calls": torch.tensor(7.0)}, CheckpointError, "its dtype is F32"),
        (
            {"head.weight": torch.zeros(50, 32, dtype=torch.int8), "head.SCB": torch.ones(50)},
            QuantizationStateError,
            "whose module is not quantized here|without its scales",
        ),
        ({"blocks.0.mlp.0.weight": torch.full((48, 32), torch.nan)}, NonFiniteWeightError, "row 0"),
    ],
)
def test_what_cannot_be(
    old: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], kind: type[Pyint8Error], words: str
) -> None:
    new = changed(tmp_path / "new.safetensors", **tensors)
    assert refused(filled(old), new, kind, words).path == str(new)


def test_what_is_int8_on_one_side_alone(old: Path, new: Path, tmp_path: Path) -> None:
    pyint8.save(filled(new, config=ALL), tmp_path / "all")
    pyint8.save(filled(new), tmp_path / "less")
    refused(filled(old), tmp_path / "all", QuantizationStateError, "head.weight.*: it is not int8 in the module")
    refused(filled(old, config=ALL), tmp_path / "less", QuantizationStateError, "without its scales")


def test_another_checkpoint_altogether(old: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "new.safetensors")
    refused(filled(old), tmp_path / "new.safetensors", CheckpointError, "none of what the model wants")


def test_wrong_calls(old: Path, new: Path) -> None:
    with pytest.raises(OptionError, match="revision"):
        pyint8.reload(filled(old), new, revision="main")
    with pytest.raises(ModelNotSupportedError, match="nothing in this Net is int8"):
        pyint8.reload(Net(), new)


def test_a_failure_in_the_middle(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = changed(tmp_path / "new.safetensors", **{"blocks.1.mlp.0.weight": torch.full((48, 32), torch.inf)})
    monkeypatch.setattr(replacing, "_CHECKED_BYTES", 0)
    net, before, wanted = filled(old), values(filled(old)), values(filled(file_of(other(), tmp_path / "good")))
    with pytest.raises(PartlyReplacedError, match="tensors of the model have their new values") as raised:
        pyint8.reload(net, new)
    assert raised.value.tensor == "blocks.1.mlp.0.weight"
    assert "blocks.0.attn.weight" in raised.value.replaced
    for name, value in values(net).items():
        weight = name.removesuffix("SCB") + "weight" if name.endswith("SCB") else name
        assert torch.equal(value, (wanted if weight in raised.value.replaced else before)[name]), name


def test_a_file_that_changes_after_the_last_write(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, net = Place.put, filled(old)

    def late(place: Place, value: torch.Tensor) -> None:
        put(place, value)
        new.touch()

    monkeypatch.setattr(Place, "put", late)
    with pytest.raises(PartlyReplacedError) as raised:
        pyint8.reload(net, new)
    assert isinstance(raised.value.__cause__, FileChangedError)
    assert set(raised.value.replaced) == set(other().state_dict())
