"""`pyint8.reload` that fails: what can be known is refused before the first write, else what was replaced is named."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import state
from reloads import CPU, LLAMA, adapted, changed, saved
from safetensors.torch import load_file
from zoo import ZOO, CheckpointStore

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
    ReadError,
    ShapeMismatchError,
)
from pyint8.models import replacing
from pyint8.models.live import Place

NAME = "model.layers.1.mlp.up_proj.weight"


def refused(model: Any, path: Path, kind: type[Pyint8Error], words: str, **options: Any) -> Pyint8Error:
    """The error, before which nothing was replaced."""
    before = state(model)
    with pytest.raises(kind, match=words) as raised:
        pyint8.reload(model, path, **options)
    assert not isinstance(raised.value, PartlyReplacedError)
    assert state(model) == before
    return raised.value


def test_another_architecture(old: Path, checkpoints: CheckpointStore) -> None:
    refused(pyint8.load(old, CPU), checkpoints.folder(ZOO["gpt2"], "bf16"), Pyint8Error, ".")


def test_other_shapes(old: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(old, intermediate_size=80)
    source = saved(transformers.LlamaForCausalLM(config), tmp_path / "new")
    error = refused(pyint8.load(old, CPU), source, ShapeMismatchError, "mlp")
    assert error.path == str(source / "model.safetensors")


def test_more_layers(old: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(old, num_hidden_layers=3)
    source = saved(transformers.LlamaForCausalLM(config), tmp_path / "new")
    error = refused(pyint8.load(old, CPU), source, CheckpointError, "which the model does not have")
    assert str(error.tensor).startswith("model.layers.2")


def test_fewer_layers(old: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(old, num_hidden_layers=1)
    source = saved(transformers.LlamaForCausalLM(config), tmp_path / "new")
    refused(pyint8.load(old, CPU), source, CheckpointError, "no values for model.layers.1")


def test_a_tensor_that_is_missing(old: Path, new: Path, tmp_path: Path) -> None:
    source = changed(new, tmp_path / "a", lambda tensors: tensors.pop("model.norm.weight"))
    model: Any = pyint8.load(old, CPU)
    assert refused(model, source, CheckpointError, "no values for").tensor == "model.norm.weight"
    norm = model.model.norm.weight.clone()
    pyint8.reload(model, source, strict=False)
    assert torch.equal(model.model.norm.weight, norm)
    assert torch.equal(model.lm_head.weight, load_file(new / "model.safetensors")["lm_head.weight"])


def test_what_is_int8_on_one_side_alone(old: Path, new: Path, tmp_path: Path) -> None:
    pyint8.convert(new, tmp_path / "int8", device="cpu")
    pyint8.convert(new, tmp_path / "less", device="cpu", config=pyint8.Int8Config(skip_modules=["lm_head", "k_proj"]))
    less = pyint8.load(old, CPU, config=pyint8.Int8Config(skip_modules=["lm_head", "k_proj"]))
    refused(less, tmp_path / "int8", QuantizationStateError, "k_proj.weight is not quantized in the model")
    refused(pyint8.load(old, CPU), tmp_path / "less", QuantizationStateError, "k_proj.weight is int8 in the model")
    pyint8.reload(less, tmp_path / "less")


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_weight_is_not_written(
    late: bool, old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = changed(new, tmp_path / "bad", lambda tensors: tensors[NAME][3, 4].fill_(float("nan")))
    model: Any = pyint8.load(old, CPU)
    weight = model.get_submodule(NAME.removesuffix(".weight")).weight
    before = weight.data.clone()
    if not late:
        assert refused(model, source, NonFiniteWeightError, "row 3").tensor == NAME
        return
    monkeypatch.setattr(replacing, "_CHECKED_BYTES", 0)
    with pytest.raises(PartlyReplacedError, match="row 3") as raised:
        pyint8.reload(model, source)
    assert isinstance(raised.value.__cause__, NonFiniteWeightError)
    assert raised.value.tensor == NAME
    assert torch.equal(weight.data, before)
    assert_replaced(model, raised.value, old, new)


def assert_replaced(model: Any, error: PartlyReplacedError, old: Path, new: Path) -> None:
    """That the error says of each tensor which of two checkpoints it has."""
    assert error.replaced
    one, two, found = state(pyint8.load(old, CPU)), state(pyint8.load(new, CPU)), state(model)
    for name in model.state_dict():
        owner = name.rpartition(".")[0]
        is_new = name in error.replaced or (name.endswith("SCB") and f"{owner}.weight" in error.replaced)
        if error.torn is None or not error.torn.startswith(owner):
            assert found[name] == (two if is_new else one)[name], name
    assert all(name in str(error) for name in error.replaced[:3])


@pytest.mark.parametrize("after", [1, 5, 16])
def test_a_failure_in_the_middle_names_what_was_replaced(
    after: int, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, put, count = pyint8.load(old, CPU), Place.put, 0

    def failing(self: Place, value: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise ReadError("the network is gone", errno=errno.EIO)
        put(self, value)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "put", failing)
        with pytest.raises(PartlyReplacedError, match="the network is gone") as raised:
            pyint8.reload(model, new)
    assert len(raised.value.replaced) == after
    assert raised.value.torn is not None
    assert_replaced(model, raised.value, old, new)
    pyint8.reload(model, new)
    assert state(model) == state(pyint8.load(new, CPU))


def test_ctrl_c_says_it_too(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, put = pyint8.load(old, CPU), Place.put

    def interrupted(self: Place, value: torch.Tensor) -> None:
        put(self, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(Place, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pyint8.reload(model, new)
    assert "neither the old model nor the new" in caplog.text


def test_a_file_that_changes(old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = changed(new, tmp_path / "a", lambda _: None)
    write = replacing.Replacement._write

    def late(self: replacing.Replacement, maker: Any) -> None:
        shutil.copy(source / "model.safetensors", source / "copy")
        (source / "copy").replace(source / "model.safetensors")
        write(self, maker)

    monkeypatch.setattr(replacing.Replacement, "_write", late)
    refused(pyint8.load(old, CPU), source, FileChangedError, "changed|another file|no longer")


def test_a_truncated_file(old: Path, new: Path, tmp_path: Path) -> None:
    source = changed(new, tmp_path / "a", lambda _: None)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert refused(pyint8.load(old, CPU), source, CheckpointError, ".").path == str(file)


def test_wrong_calls(old: Path, new: Path, tmp_path: Path) -> None:
    model = pyint8.load(old, CPU)
    for name in ("dtype", "device_map", "config"):
        refused(model, new, OptionError, name, **{name: None})
    refused(model, new, OptionError, "threads", threads=3)
    refused(model, new, OptionError, "options is", options=3)
    refused(model, new, OptionError, "nonsense", nonsense=3)
    refused(model, tmp_path, Pyint8Error, "holds none of")
    with pytest.raises(OptionError, match="must be an int8 model"):
        pyint8.reload("model", new)  # type: ignore[arg-type]
    with pytest.raises(ModelNotSupportedError, match="nothing in this"):
        pyint8.reload(LLAMA.build(), new)


def test_has_fp16_weight_is_refused(old: Path, new: Path) -> None:
    model = pyint8.load(old, CPU, config=pyint8.Int8Config(has_fp16_weight=True))
    refused(model, new, ModelNotSupportedError, "has_fp16_weight")


def test_an_adapter_s_folder(old: Path, tmp_path: Path) -> None:
    adapted(pyint8.load(old, CPU)).save_pretrained(tmp_path / "adapter")
    refused(pyint8.load(old, CPU), tmp_path / "adapter", OptionError, "is an adapter")


def test_models_without_values(old: Path, new: Path) -> None:
    model: Any = pyint8.load(old, CPU)
    model.lm_head.to("meta")
    with pytest.raises(CheckpointError, match="no values in the model"):
        pyint8.reload(model, new)


@pytest.mark.usefixtures("nothing_left")
def test_nothing_is_left(old: Path, new: Path) -> None:
    pyint8.reload(pyint8.load(old, CPU), new)
