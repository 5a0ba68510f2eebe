"""What stays in 16 or 32 bit is in the report, and told where it is much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import ALL, Net, drawn, saved
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config, LoadReport

Load = Callable[..., Any]
IN_EXPERTS = r"model\.layers\.\d\.mlp\.experts"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "are not int8" in record.getMessage()]


def fill(tmp_path: Path, module: nn.Module, **kwargs: Any) -> LoadReport:
    _, report = pyint8.load(saved(tmp_path, drawn(module)), "cpu", model=module, return_report=True, **kwargs)
    return report  # type: ignore[no-any-return]


@pytest.mark.parametrize("checkpoint", ["bf16", PREQUANTIZED])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_fused_experts_are_told(name: str, checkpoint: str, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    model, report = load(name, checkpoint, return_report=True)
    (text,) = told(caplog)
    assert f"of this {type(model).__name__}'s" in text
    assert "fused experts, which pyint8.Int8Config(experts=True) quantizes (and saves " in text
    assert "such as model.layers.0.mlp.experts." in text
    assert "fused experts" in str(report)
    experts = {n: p for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    assert {n: report.skipped_bytes[n] for n in experts} == {n: p.nbytes for n, p in experts.items()}
    assert all(report.skipped[n].startswith("fused experts") for n in experts)


def test_the_drop_in_and_a_takeover_tell_it_too(checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoints.folder(ZOO["qwen3_moe"], "bf16")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config())
    with pyint8.takeover():
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert len(told(caplog)) == 2


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "whisper", "llava", "bert_mlm"])
def test_everything_is_listed_once(name: str, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    model, report = load(name, return_report=True)
    quantized = [p for p in model.parameters() if p.dtype == torch.int8]
    smallest = min(p.numel() for p in quantized)
    for full_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.squeeze().dim() > 1 and parameter.numel() >= smallest:
            assert report.skipped_bytes[full_name.removesuffix(".weight")] == parameter.nbytes
    assert report.skipped.keys() == report.skipped_bytes.keys()
    assert sum(report.skipped_bytes.values()) <= sum(p.nbytes for p in model.parameters() if p.dtype != torch.int8)
    assert not [text for text in told(caplog) if "an embedding" in text]


def test_a_tied_heads_bytes_count_once(load: Load) -> None:
    model, report = load("llama_tied", return_report=True)
    assert report.skipped_bytes["model.embed_tokens"] == model.lm_head.weight.nbytes
    assert report.skipped_bytes["lm_head"] == 0
    assert report.skipped["lm_head"] == "in the list of modules to skip"


class Mixed(nn.Module):
    """A bit of everything that is no linear module."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 40, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv = nn.Conv1d(width, width, 3)
        self.attention = nn.MultiheadAttention(width, 4)
        self.recurrent = nn.GRU(width, width)
        self.experts = nn.Parameter(torch.zeros(4, width, width))
        self.body = nn.Linear(width, width)
        self.small = nn.Parameter(torch.zeros(2, 3))
        self.head = nn.Linear(width, 5)


def test_every_kind_has_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Mixed()
    report = fill(tmp_path, module, dtype=torch.float16)
    assert report.skipped == {
        "embed": "an embedding",
        "pos_embed": "an embedding",
        "conv": "a convolution",
        "attention.in_proj_weight": "torch's attention keeps query, key and value in one parameter",
        "attention.out_proj": "its weight is used without calling the module",
        "recurrent.weight_ih_l0": "a parameter of GRU, which is no linear module",
        "recurrent.weight_hh_l0": "a parameter of GRU, which is no linear module",
        "experts": "fused experts: one parameter holds the weights of all",
        "head": "in the list of modules to skip",
    }
    for name, size in report.skipped_bytes.items():
        own = dict(module.named_parameters())
        assert size == own.get(name, own.get(f"{name}.weight")).nbytes
    assert len(told(caplog)) == 1


def test_the_largest_kind_is_named_with_the_totals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(
        nn.Linear(64, 64), nn.Conv1d(64, 64, 3), nn.Conv1d(64, 64, 3), nn.GRU(64, 16), nn.Linear(64, 4)
    )
    fill(tmp_path, module, dtype=torch.float16)
    (text,) = told(caplog)
    convolutions, recurrent = 2 * 2 * 64 * 64 * 3, 2 * (48 * 64 + 48 * 16)
    total = convolutions + recurrent + 64 * 64 + 2 * (64 * 3 + 48 * 2)
    assert text.startswith(
        f"{round((convolutions + recurrent) / 1000)} kB of this Sequential's {round(total / 1000)} kB, output head and "
        f"embeddings aside, are not int8; most of that, {round(convolutions / 1000)} kB: a convolution, such as 1 ("
    )


@pytest.mark.parametrize(("width", "warned"), [(4, True), (3, False)])
def test_a_tenth_is_tolerated(width: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A body of 6,400 int8 bytes, and 2 x 90 x `width` in 16 bit: 10.1 % or 7.8 %."""
    module = nn.Module()
    module.body = nn.Linear(80, 80, bias=False)
    module.rest = nn.Parameter(torch.zeros(90, width))
    module.head = nn.Linear(80, 80, bias=False)
    fill(tmp_path, module, dtype=torch.float16)
    assert len(told(caplog)) == warned


def test_what_was_asked_for_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = fill(tmp_path, Net(), config=Int8Config(skip_modules=["blocks.0", "head"]))
    assert report.skipped["blocks.0.attn"] == "in the list of modules to skip"
    assert not told(caplog)


def test_norms_and_biases_are_no_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(*(nn.LayerNorm(8) for _ in range(200)), nn.Linear(8, 8), nn.Linear(8, 8))
    report = fill(tmp_path, module, config=ALL)
    assert not report.skipped
    assert not told(caplog)


def test_a_model_without_int8_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = fill(tmp_path, nn.Sequential(nn.Conv1d(64, 64, 3), nn.Conv1d(64, 64, 3)))
    assert [record.getMessage()[:29] for record in caplog.records] == ["nothing in this Sequential is"]
    assert not report.skipped


def test_what_is_left_on_the_disk_counts_too(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    placed = {name: "disk" if name == "model.layers.1" else "cpu" for name in modules}
    config = Int8Config(fp32_cpu_offload=True)
    model, report = load("llama", device_map=placed, offload_folder=tmp_path, config=config, return_report=True)
    left = model.model.layers[1].mlp.up_proj.weight
    assert left.is_meta
    assert report.skipped_bytes["model.layers.1.mlp.up_proj"] == left.nbytes > 0
    assert not told(caplog)
