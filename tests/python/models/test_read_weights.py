"""Modules whose weight is read stay ordinary on every road, whatever the checkpoint holds of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import reading_modules
import torch
import transformers as tf
from oracle import compare_reloaded, peer_load, show
from plain_models import drawn, saved
from reading_modules import Base
from reads import reads
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D
from zoo import randomise

import pyint8
from pyint8 import Int8Config

ALL = Int8Config(skip_modules=[])
READ = "its weight is used without calling the module ("
TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, Any] = {**TINY, "vocab_size": 128, "max_position_embeddings": 64}
INPUT = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(6, 16)[None]
BOXES = torch.randint(0, 60, (1, 10, 4), generator=torch.Generator().manual_seed(0)).sort(-1).values


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return F.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), dim=0).item()


def int8_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}


def read_names(report: pyint8.LoadReport) -> set[str]:
    return {name for name, reason in report.skipped.items() if reason.startswith(READ)}


# --- modules of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Functional", "CastLater", "Looped", "Helped", "Giving", "CastToFirstParameter"])
def test_a_module_of_ones_own_computes_what_it_did(kind: str, tmp_path: Path) -> None:
    cls = getattr(reading_modules, kind)
    source = drawn(cls()).half()
    ours, report = pyint8.load(saved(tmp_path, source), "cpu", model=cls().eval(), config=ALL, return_report=True)
    read = {"bs.0", "bs.1"} if kind == "Looped" else {"a"}
    assert read_names(report) == read
    assert int8_names(ours) == {"a", "b", "bs.0", "bs.1"} - read
    with torch.no_grad():
        assert alike(ours(INPUT.half()), source(INPUT.half())) > 0.999


def test_what_training_reads_counts_for_a_module_in_training_mode(tmp_path: Path) -> None:
    from calling_modules import InTraining

    folder = saved(tmp_path, drawn(InTraining()))
    assert "a" in int8_names(pyint8.load(folder, "cpu", model=InTraining().eval(), config=ALL))
    assert "a" not in int8_names(pyint8.load(folder, "cpu", model=InTraining().train(), config=ALL))


def test_sixteen_bit_weights_may_be_read(tmp_path: Path) -> None:
    config = Int8Config(skip_modules=[], has_fp16_weight=True)
    folder = saved(tmp_path, drawn(reading_modules.Functional()))
    ours = pyint8.load(folder, "cpu", model=reading_modules.Functional(), config=config, dtype=torch.float32)
    assert "a" in int8_names(ours)


class ReadsConv1D(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a = Conv1D(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x) @ self.a.weight + self.a.bias


def in_int8(module: nn.Module, names: list[str]) -> nn.Module:
    """As something that does not look at code would save it."""
    module = copy.deepcopy(module).half()
    for name in names:
        old = module.get_submodule(name)
        weight = old.weight.data.T.contiguous() if isinstance(old, Conv1D) else old.weight.data
        new = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        new.bias = old.bias
        module.set_submodule(name, new)
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "auto"], ids=str)
@pytest.mark.parametrize("cls", [reading_modules.Functional, ReadsConv1D])
def test_codes_of_what_is_read_become_weights(cls: type[Base], dtype: torch.dtype | str, tmp_path: Path) -> None:
    source = drawn(cls())
    folder = saved(tmp_path, in_int8(source, ["a", "b"]))
    ours, report = pyint8.load(folder, "cpu", model=cls().eval(), config=ALL, dtype=dtype, return_report=True)
    assert read_names(report) == {"a"}
    assert int8_names(ours) == {"b"}
    assert report.tensors["dequantized"] == report.tensors["pre-quantized"] == 1
    assert not report.loading_info["unexpected_keys"]
    stored = load_file(folder / "model.safetensors")
    weight = stored["a.weight"].float() * stored["a.SCB"][:, None] / 127
    weight = weight.T if cls is ReadsConv1D else weight
    wanted = torch.float16 if dtype == "auto" else dtype
    assert ours.a.weight.dtype == wanted
    torch.testing.assert_close(ours.a.weight, weight.to(wanted))
    with torch.no_grad():
        assert alike(ours(INPUT.to(wanted)), source(INPUT)) > 0.999


# --- transformers' models ---------------------------------------------------------------------------------------------


def mobilebert() -> tf.PreTrainedModel:
    return tf.MobileBertForMaskedLM(tf.MobileBertConfig(**TEXT, embedding_size=32, intra_bottleneck_size=32))


def layoutlmv3() -> tf.PreTrainedModel:
    sizes = {"coordinate_size": 10, "shape_size": 12, "input_size": 32, "patch_size": 8}
    return tf.LayoutLMv3Model(tf.LayoutLMv3Config(**TEXT, **sizes))


def mamba() -> tf.PreTrainedModel:
    return tf.MambaForCausalLM(tf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=8))


def siglip2() -> tf.PreTrainedModel:
    return tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**TINY, num_patches=16, patch_size=8))


Call = Callable[[Any], torch.Tensor]
_PATCHES = {
    "pixel_values": torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(0)),
    "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    "spatial_shapes": torch.tensor([[4, 4]]),
}
MODELS: dict[str, tuple[Callable[[], tf.PreTrainedModel], Call, set[str]]] = {
    "mobilebert": (mobilebert, lambda model: model(IDS).logits, {"cls.predictions.dense"}),
    "layoutlmv3": (
        layoutlmv3,
        lambda model: model(input_ids=IDS, bbox=BOXES).last_hidden_state,
        {f"encoder.rel_pos_{axis}bias" for axis in ("", "x_", "y_")},
    ),
    "mamba": (mamba, lambda model: model(IDS).logits, {f"backbone.layers.{n}.mixer.dt_proj" for n in range(2)}),
    "siglip2": (
        siglip2,
        lambda model: model(**{**_PATCHES, "pixel_values": _PATCHES["pixel_values"].to(model.dtype)}).last_hidden_state,
        {"embeddings.patch_embedding"},
    ),
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    randomise(MODELS[name][0](), name, outliers=False).half().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def sixteen_bit(name: str, folder: Path) -> torch.Tensor:
    build, call, _ = MODELS[name]
    with torch.no_grad():
        return call(type(build()).from_pretrained(folder, dtype=torch.float16))


def test_a_transformers_model_computes_what_it_did(name: str, folder: Path, tmp_path: Path) -> None:
    build, call, read = MODELS[name]
    cls = type(build())
    ours, report = pyint8.load(folder, "cpu", model=cls, dtype=torch.float16, return_report=True)
    assert read_names(report) >= read - {"encoder.rel_pos_y_bias"}  # the last one counts as the head
    assert not read & int8_names(ours)
    with torch.no_grad():
        assert alike(call(ours), sixteen_bit(name, folder)) > 0.999
    assert set(ours.config.quantization_config.llm_int8_skip_modules) >= read_names(report)
    ours.save_pretrained(tmp_path / "int8")
    assert not compare_reloaded(ours, tmp_path / "int8"), show(compare_reloaded(ours, tmp_path / "int8"))
    again = pyint8.load(tmp_path / "int8", "cpu", model=cls)
    with torch.no_grad():
        assert torch.equal(call(again), call(ours))


def test_an_int8_checkpoint_of_transformers_is_mended(name: str, folder: Path, tmp_path: Path) -> None:
    """It has codes for what is read, which transformers computes with."""
    build, call, read = MODELS[name]
    cls = type(build())
    theirs, _ = peer_load(folder, cls, dtype=torch.float16, device_map="cpu")
    stored = {name for name in read if name in int8_names(theirs)}
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = pyint8.load(tmp_path / "theirs", "cpu", model=cls, return_report=True)
    assert read_names(report) == stored
    assert report.tensors["dequantized"] == len(stored) > 0
    assert not report.loading_info["unexpected_keys"]
    with torch.no_grad():
        assert alike(call(ours), sixteen_bit(name, folder)) > 0.999
    ours.save_pretrained(tmp_path / "ours")
    assert not compare_reloaded(ours, tmp_path / "ours")


def test_the_drop_in_and_a_takeover_leave_it_ordinary_too(name: str, folder: Path) -> None:
    build, call, read = MODELS[name]
    cls: Any = type(build())
    expected = sixteen_bit(name, folder)
    with pyint8.takeover():
        config = tf.BitsAndBytesConfig(load_in_8bit=True)
        taken = cls.from_pretrained(folder, dtype=torch.float16, quantization_config=config)
    assert config.llm_int8_skip_modules is None  # it may be for other models too
    dropped = cls.from_pretrained(folder, dtype=torch.float16, quantization_config=Int8Config())
    for model in (taken, dropped):
        assert not read & int8_names(model)
        assert int8_names(model)
        with torch.no_grad():
            assert alike(call(model), expected) > 0.999


# Of architectures whose smallest model is not that small: what is read, by the class that has it.
ON_META: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "colpali": (lambda: tf.ColPaliForRetrieval(tf.ColPaliConfig()), {"embedding_proj_layer"}),
    "ernie": (
        lambda: tf.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoePatchEmbed(14, 3, 64),
        {"proj"},
    ),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config()), set()),
    "nllb_moe": (lambda: tf.NllbMoeForConditionalGeneration(tf.NllbMoeConfig(num_experts=4)), set()),
    "bloom": (lambda: tf.BloomForCausalLM(tf.BloomConfig()), set()),
    "qwen2_vl": (lambda: tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig()), set()),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=2)), set()),
    "rwkv": (lambda: tf.RwkvForCausalLM(tf.RwkvConfig(num_hidden_layers=2)), set()),
}


@pytest.mark.parametrize("name", ON_META)
def test_what_is_read_of_larger_models(name: str) -> None:
    build, read = ON_META[name]
    with torch.device("meta"):
        model = build()
    assert reads(model, _is_quantized=True).keys() == read


# --- code that comes with a checkpoint --------------------------------------------------------------------------------

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class ReadingConfig(LlamaConfig):
    model_type = "reading"
class Gate(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.proj = torch.nn.Linear(size, size, bias=False)
        self.q_proj = torch.nn.Linear(size, size, bias=False)
    def forward(self, x):
        dtype = self.proj.weight.dtype
        return self.q_proj(torch.nn.functional.linear(x.to(dtype), self.proj.weight))
class ReadingModel(LlamaForCausalLM):
    config_class = ReadingConfig
    def __init__(self, config):
        super().__init__(config)
        self.proj = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = Gate(config.hidden_size)
        self.last = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def forward(self, input_ids, **kwargs):
        hidden = self.gate(self.model(input_ids).last_hidden_state)
        return self.last(torch.nn.functional.linear(hidden, self.proj.weight))
"""


def test_code_that_comes_with_a_checkpoint_is_read(tmp_path: Path) -> None:
    """One of the names is the end of others: the list of what is not int8 must not say those too."""
    space: dict[str, Any] = {"__name__": "reading"}
    exec(CODE, space)
    sizes = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}
    source = randomise(space["ReadingModel"](space["ReadingConfig"](**sizes)), "reading", outliers=False).half()
    source.save_pretrained(tmp_path / "remote")
    config = json.loads((tmp_path / "remote" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "reading.ReadingConfig", "AutoModelForCausalLM": "reading.ReadingModel"}
    for folder in ("remote", "int8"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "reading.py").write_text(CODE)
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))

    trusted: dict[str, Any] = {"trust_remote_code": True, "model": tf.AutoModelForCausalLM}
    ours, report = pyint8.load(tmp_path / "remote", "cpu", dtype=torch.float16, return_report=True, **trusted)
    assert read_names(report) == {"proj", "gate.proj"}
    assert "gate.q_proj" in int8_names(ours)
    with torch.no_grad():
        assert alike(ours(IDS), source(IDS)) > 0.999
    ours.save_pretrained(tmp_path / "int8")
    for again in (
        pyint8.load(tmp_path / "int8", "cpu", **trusted),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "int8", trust_remote_code=True, device_map="cpu"),
    ):
        assert int8_names(again) == int8_names(ours)
        with torch.no_grad():
            assert torch.equal(again(IDS), ours(IDS))
