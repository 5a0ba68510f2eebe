"""pyint8.load(path, model=module): any torch.nn.Module whose state dict has the checkpoint's names."""

import logging
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from plain_models import ALL, IDS, INT8, Net, assert_same, by_hand, drawn, on_meta, saved
from safetensors.torch import save_file, save_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyint8
from pyint8 import StreamOptions
from pyint8.errors import CheckpointError, ShapeMismatchError

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("start", ["meta", "values"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, "bfloat16"], ids=str)
def test_the_same_as_bitsandbytes_by_hand(dtype: Any, start: str, tmp_path: Path) -> None:
    source = drawn(Net())
    folder = saved(tmp_path, source)
    module = on_meta() if start == "meta" else Net().eval()
    ours, report = pyint8.load(folder, "cpu", model=module, dtype=dtype, return_report=True)
    named = {None: torch.float16, "bfloat16": torch.bfloat16}
    theirs = by_hand(source, INT8, named.get(dtype, dtype))
    assert ours is module
    assert_same(ours, theirs)
    assert report.skipped == {"head": "in the list of modules to skip", "embed": "an embedding"}
    assert report.skipped_bytes == {name: ours.get_submodule(name).weight.nbytes for name in ("head", "embed")}
    assert report.tensors["int8"] == len(INT8)
    assert not any(report.loading_info.values())
    with torch.no_grad():
        assert torch.equal(ours(IDS), theirs(IDS))


def test_auto_keeps_every_dtype(tmp_path: Path) -> None:
    source = drawn(Net()).to(torch.bfloat16)
    source.norm.float()
    ours = pyint8.load(saved(tmp_path, source), "cpu", model=on_meta(), dtype="auto")
    assert (ours.norm.weight.dtype, ours.head.weight.dtype) == (torch.float32, torch.bfloat16)
    assert (ours.shift.dtype, ours.calls.dtype) == (torch.bfloat16, torch.int64)
    assert ours.get_submodule(INT8[0]).weight.dtype == torch.int8


def test_bands_give_the_same(tmp_path: Path) -> None:
    source = drawn(nn.Sequential(nn.Linear(512, 700), nn.ReLU(), Conv1D(640, 700)))
    folder = saved(tmp_path, source)
    module = nn.Sequential(nn.Linear(512, 700), nn.ReLU(), Conv1D(640, 700))
    options = StreamOptions(host_scratch=1 << 20, slot_bytes=8192)
    ours = pyint8.load(folder, "cpu", model=module, config=ALL, dtype=torch.float16, options=options)
    assert_same(ours, by_hand(source, ["0", "2"]))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, drawn(Net()))
    ours = pyint8.load(folder, "cpu", model=Net().train(training))
    assert {module.training for module in ours.modules()} == {training}


def test_gradients_of_what_stays_ordinary(tmp_path: Path) -> None:
    module = on_meta()
    module.norm.requires_grad_(False)
    ours = pyint8.load(saved(tmp_path, drawn(Net())), "cpu", model=module)
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    biases = {f"{name}.bias" for name in INT8 if ours.get_submodule(name).bias is not None}
    int8 = {f"{name}.weight" for name in INT8}
    assert trainable | biases == set(dict(ours.named_parameters())) - int8 - {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("names", ["one", "both"])
@pytest.mark.parametrize("start", ["meta", "values"])
def test_ties_are_kept(start: str, names: str, tmp_path: Path) -> None:
    source = drawn(Net(tied=True))
    if names == "one":
        save_model(source, str(tmp_path / "model.safetensors"))
    else:
        saved(tmp_path, source)
    ours = pyint8.load(
        tmp_path, "cpu", dtype=torch.float16, model=on_meta(tied=True) if start == "meta" else Net(tied=True).eval()
    )
    assert ours.head.weight is ours.embed.weight
    assert torch.equal(ours.embed.weight, source.embed.weight.half())
    assert_same(ours, by_hand(source, INT8))


def test_a_tied_head_that_shall_be_int8_has_the_embeddings_values(tmp_path: Path) -> None:
    source = drawn(Net(tied=True))
    save_model(source, str(tmp_path / "model.safetensors"))
    ours = pyint8.load(tmp_path, "cpu", dtype=torch.float16, model=Net(tied=True).eval(), config=ALL)
    expected = source.embed.weight.half()
    assert torch.equal(ours.embed.weight, expected)
    if isinstance(ours.head, bnb.nn.Linear8bitLt):
        assert torch.equal(ours.head.weight.SCB, expected.abs().amax(dim=1).float())
    else:
        assert torch.equal(ours.head.weight, expected)


def test_an_absent_head_stays_ordinary_and_trainable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, drawn(Net()), "head.weight", "blocks.1.attn.weight")
    module = Net().eval()
    before = module.head.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "pyint8"):
        ours, report = pyint8.load(folder, "cpu", model=module, config=ALL, return_report=True)
    assert type(ours.head) is nn.Linear
    assert type(ours.blocks[1].attn) is Conv1D
    assert ours.head.weight.requires_grad
    assert torch.equal(ours.head.weight, before)
    (record,) = caplog.records
    assert "2 linear modules are not in the checkpoint" in record.getMessage()
    assert "blocks.1.attn, head; train before use" in record.getMessage()
    absent = dict.fromkeys(["blocks.1.attn", "head"], "its weight is not in the checkpoint")
    assert report.skipped == {**absent, "embed": "an embedding"}
    assert report.loading_info["missing_keys"] == {"blocks.1.attn.weight", "head.weight"}


def test_a_parameter_on_meta_must_be_in_the_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, drawn(Net()), "norm.weight")
    with pytest.raises(CheckpointError, match="no such tensor, and the module holds no values for it") as caught:
        pyint8.load(folder, "cpu", model=on_meta())
    assert caught.value.tensor == "norm.weight"
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_on_meta_must_be_in_the_checkpoint(persistent: bool, tmp_path: Path) -> None:
    module = on_meta()
    module.register_buffer("angles", torch.empty(4, device="meta"), persistent=persistent)
    with pytest.raises(CheckpointError) as caught:
        pyint8.load(saved(tmp_path, drawn(Net())), "cpu", model=module)
    assert caught.value.tensor == "angles"


def test_buffers_with_values_are_kept_and_those_stored_are_loaded(tmp_path: Path) -> None:
    source = drawn(Net())
    source.shift.copy_(torch.linspace(-1, 0, 32))
    module = Net().eval()
    module.register_buffer("angles", torch.tensor([0.5, 0.25]), persistent=False)
    ours = pyint8.load(saved(tmp_path, source, "calls"), "cpu", dtype=torch.float16, model=module)
    assert torch.equal(ours.shift, source.shift.half())
    assert torch.equal(ours.angles, torch.tensor([0.5, 0.25]).half())
    assert ours.calls == 7


def test_what_the_checkpoint_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Net().eval()
    before = module.norm.weight.detach().half()
    ours, report = pyint8.load(
        saved(tmp_path, drawn(Net()), "norm.weight", "calls"), "cpu", model=module, return_report=True
    )
    assert "not in the checkpoint, so left as they are: calls, norm.weight" in caplog.text
    assert report.loading_info["missing_keys"] == {"calls", "norm.weight"}
    assert torch.equal(ours.norm.weight, before)


def test_a_wrapper_is_told_that_it_is_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, drawn(Net()))
    with pytest.raises(CheckpointError, match=r"the model's own names begin with '_orig_mod.'; fill what is inside"):
        pyint8.load(folder, "cpu", model=torch.compile(Net()))


def test_a_module_of_several_names_stays_one(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.second = self.first
            self.other = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.second(self.first(x)))

    source = drawn(Twice())
    folder = saved(tmp_path, source)
    ours, report = pyint8.load(folder, "cpu", model=Twice().eval(), config=ALL, dtype=torch.float32, return_report=True)
    assert ours.first is ours.second
    assert report.skipped == {"first": "the module has several names"}
    assert torch.equal(ours.first.weight, source.first.weight)
    assert ours.other.weight.dtype == torch.int8
    assert ours(torch.ones(2, 32)).isfinite().all()


def test_names_without_a_place_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = drawn(Net())
    source.register_buffer("ghost", torch.ones(1))
    _, report = pyint8.load(saved(tmp_path, source), "cpu", model=on_meta(), return_report=True)
    assert report.loading_info["unexpected_keys"] == {"ghost"}
    assert "the checkpoint's ghost have no place in the module" in caplog.text


@pytest.mark.parametrize("name", ["blocks.0.mlp.0.weight", "blocks.1.attn.weight", "norm.bias", "shift"])
def test_a_wrong_shape_is_refused(name: str, tmp_path: Path) -> None:
    tensors = dict(drawn(Net()).state_dict())
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ShapeMismatchError, match=r"its shape is \[\d+.*\], and .* needs \[\d+.*\]") as caught:
        pyint8.load(tmp_path, "cpu", model=on_meta())
    assert (caught.value.tensor, caught.value.path) == (name, str(tmp_path / "model.safetensors"))
    assert caught.value.offset is not None


def test_weights_that_torch_uses_directly_stay_as_they_are(tmp_path: Path) -> None:
    """In evaluation nn.TransformerEncoderLayer hands the weights of its linear layers to a kernel of its own."""

    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()

    source, inputs = drawn(encoder()), torch.linspace(-1, 1, 320).reshape(2, 5, 32)
    ours = pyint8.load(saved(tmp_path, source), "cpu", model=encoder(), dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(ours(inputs), source(inputs), atol=0.5)
