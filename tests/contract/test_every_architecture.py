"""Every architecture of the installed transformers, small: the same bytes as its own int8 load gives, and of use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from architectures import MODEL_TYPES, NotBuiltError, build
from forwards import calls, first_that_runs, run
from oracle import SERIALIZABLE, compare_loading_info, compare_models, peer_load, remains, show
from zoo import randomise

import pyint8

pytestmark = pytest.mark.slow

KWARGS: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float16}
# Differently on purpose: Falcon's linear layers are quantized here; what transformers itself does not read back of the
# ShieldGemma 2 it saved stays ordinary (see test_identity for both).
OTHERWISE = {"falcon", "shieldgemma2"}
LEAST_COMPARED = 450  # 5.23 has 491 that can be built so small

# Outputs are as the 16-bit model's by this cosine at least.
LEAST_ALIKE = 0.97
LEAST_RUN = 370  # 5.23: 400
# But not of these, and why.
UNLIKE = {
    "lightglue": "which of its points match is decided by comparing scores that lie close together",
    "shieldgemma2": "transformers draws some of its weights anew in every load",
}
# What a forward pass of these takes, however small they are, is half a minute and more: only their bytes are compared.
LONG = {"vits", "vjepa2"}
# bitsandbytes multiplies no activations of four dimensions by int8 weights; that such a model calls one shows here.
FOUR_DIMENSIONS = {
    "forward": (
        *("axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "focalnet", "glm4_moe_lite", "glm_moe_dsa"),
        *("hy_v4", "kimi_k25", "minicpm3", "nemotron3_5_asr", "nemotron_asr_streaming", "parakeet_rnnt"),
        *("parakeet_tdt", "patchtsmixer", "patchtst", "pp_formulanet", "prophetnet", "sam3_vision_model"),
        *("sam3_vit_model", "sam_hq_vision_model", "sam_vision_model", "vitdet", "wavlm", "youtu"),
    ),
    "get_image_features": ("got_ocr2", "lfm2_vl", "pp_chart2table"),
}

compared: set[str] = set()
ran: set[str] = set()


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Everything is tiny: threads would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_same_model(model_type: str, tmp_path: Path) -> None:
    try:
        model = randomise(build(model_type), model_type, outliers=False).to(torch.bfloat16)
        model.save_pretrained(tmp_path)
    except NotBuiltError as error:
        pytest.skip(str(error).splitlines()[0])
    cls = type(model)
    torch.manual_seed(0)
    ours, report = pyint8.load(tmp_path, model=cls, return_report=True, **KWARGS)
    theirs, their_info = peer_load(tmp_path, cls, **KWARGS, **_as_left_ordinary(ours, report))
    found = compare_models(ours, theirs, allow=[SERIALIZABLE])
    found += compare_loading_info(report.loading_info, their_info)
    assert not found or model_type in OTHERWISE, show(found)
    assert remains(ours) == []
    compared.add(model_type)
    if model_type not in LONG and any(isinstance(module, bnb.nn.Linear8bitLt) for module in ours.modules()):
        compare_with_16_bit(model_type, ours, cls.from_pretrained(tmp_path, **KWARGS))


def _as_left_ordinary(ours: tf.PreTrainedModel, report: pyint8.LoadReport) -> dict[str, Any]:
    """The peer skips what stays ordinary here, as its weight is used without calling it."""
    if not any(reason.startswith("its weight is used without") and "(" in reason for reason in report.skipped.values()):
        return {}
    skip = list(ours.hf_quantizer.modules_to_not_convert)
    return {"quantization_config": tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)}


def compare_with_16_bit(model_type: str, ours: tf.PreTrainedModel, half: tf.PreTrainedModel) -> None:
    """Runs both where inputs can be found on which the latter gives finite numbers."""
    for our_call, their_call in zip(calls(ours), calls(half), strict=True):
        name = their_call.__name__
        found = first_that_runs(their_call, half)
        if found is None:
            continue
        inputs, expected = found
        if model_type in FOUR_DIMENSIONS.get(name, ()):
            with pytest.raises(RuntimeError, match="size"):
                run(our_call, inputs, ours.dtype)
            continue
        output = run(our_call, inputs, ours.dtype)
        assert output is not None
        alike = torch.nn.functional.cosine_similarity(output, expected, dim=0).item()
        assert alike >= LEAST_ALIKE or model_type in UNLIKE, f"{name}: cosine {alike}"
        ran.add(model_type)


def test_many_were_compared(request: pytest.FixtureRequest) -> None:
    if sum(item.path == request.path for item in request.session.items) <= len(MODEL_TYPES):
        pytest.skip("not all were asked for")
    assert len(compared) >= LEAST_COMPARED
    assert len(ran) >= LEAST_RUN
