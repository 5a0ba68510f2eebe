"""pyint8 in code that calls from_pretrained itself: by its configuration, or by a block."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from oracle import SERIALIZABLE, compare_loading_info, compare_models, compare_outputs, peer_load, remains, show
from safetensors.torch import load_file, save_file
from transformers import core_model_loading
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from zoo import PREQUANTIZED, ZOO, CheckpointStore

import pyint8
from pyint8.checkpoint import open_checkpoint
from pyint8.errors import CheckpointError, NonFiniteWeightError, OptionError
from pyint8.models.transformers.hooks import StreamedInt8HfQuantizer
from pyint8.models.transformers.session import LoadSession

CPU = {"": "cpu"}
IN_8BIT = tf.BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes that came through the engine, a number for each load."""
    seen: list[int] = []
    close = LoadSession.close

    def noting(session: LoadSession) -> None:
        was_open = session.planned is not None and session.planned.has_started
        close(session)
        if was_open:
            seen.append(int(session.recorder.report.engine["bytes_delivered"]))

    monkeypatch.setattr(LoadSession, "close", noting)
    return seen


def load_by(
    way: str, folder: Path | None, cls: Any, int8: pyint8.Int8Config, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    if way == "config":
        return cls.from_pretrained(folder, quantization_config=int8, output_loading_info=True, **kwargs)
    with pyint8.takeover():
        genuine = tf.BitsAndBytesConfig(**{k: v for k, v in int8.to_dict().items() if k != "quant_method"})
        return cls.from_pretrained(folder, quantization_config=genuine, output_loading_info=True, **kwargs)


@pytest.mark.parametrize("way", ["config", "takeover"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral", "t5", "llava", "bert_mlm"])
def test_the_same_model(name: str, dtype: Any, way: str, checkpoints: CheckpointStore, delivered: list[int]) -> None:
    model = ZOO[name]
    folder = checkpoints.folder(model, "bf16")
    kwargs = {"device_map": CPU} | ({} if dtype is None else {"dtype": dtype})
    with model.peer_help():
        theirs, their_info = peer_load(folder, model.cls, **kwargs)
    ours, our_info = load_by(way, folder, model.cls, pyint8.Int8Config(), **kwargs)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE]) + compare_loading_info(our_info, their_info)
    found += compare_outputs(ours, theirs, model.inputs(theirs))
    assert not found, show(found)
    assert delivered == [open_checkpoint(folder).nbytes]
    assert remains(ours) == []


@pytest.mark.parametrize("way", ["config", "takeover"])
def test_the_configuration_counts(way: str, checkpoints: CheckpointStore) -> None:
    config = pyint8.Int8Config(threshold=4.5, skip_modules=["lm_head", "q_proj"])
    model, _ = load_by(way, checkpoints.folder(ZOO["llama"], "bf16"), tf.AutoModelForCausalLM, config, device_map=CPU)
    layer = model.model.layers[0].self_attn
    assert type(layer.q_proj) is torch.nn.Linear
    assert layer.k_proj.state.threshold == 4.5
    assert type(model.config.quantization_config) is tf.BitsAndBytesConfig
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head", "q_proj"]
    assert type(model.hf_quantizer) is Bnb8BitHfQuantizer


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama_tied"])
def test_int8_checkpoints_are_taken_over(name: str, checkpoints: CheckpointStore, delivered: list[int]) -> None:
    model = ZOO[name]
    folder = checkpoints.folder(model, PREQUANTIZED)
    theirs = model.cls.from_pretrained(folder, device_map=CPU)
    assert delivered == []
    with pyint8.takeover():
        ours = model.cls.from_pretrained(folder, device_map=CPU)
    assert delivered == [open_checkpoint(folder).nbytes]
    allowed = [SERIALIZABLE, "modules//attributes/_weight_conversions*"]  # the peer keeps its int8 deserializer there
    found = compare_models(ours, theirs, allow=allowed) + compare_outputs(ours, theirs, model.inputs(theirs))
    assert not found, show(found)
    assert remains(ours) == []


@pytest.mark.parametrize("way", ["config", "takeover"])
def test_offload_to_the_disk(way: str, checkpoints: CheckpointStore, tmp_path: Path, delivered: list[int]) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    modules = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {name: "disk" if name == "model.layers.1" else "cpu" for name in modules}
    kwargs: dict[str, Any] = {"device_map": device_map, "dtype": torch.float16}
    int8 = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    theirs = tf.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=int8, offload_folder=tmp_path / "theirs", **kwargs
    )
    ours, _ = load_by(
        way,
        folder,
        tf.LlamaForCausalLM,
        pyint8.Int8Config(fp32_cpu_offload=True),
        offload_folder=tmp_path / "ours",
        **kwargs,
    )
    assert not list((tmp_path / "ours").glob("*.dat"))
    assert not compare_outputs(ours, theirs, ZOO["llama"].inputs(theirs))
    on_disk = sum(entry.nbytes for name, entry in open_checkpoint(folder).entries.items() if "layers.1." in name)
    assert delivered == [open_checkpoint(folder).nbytes - on_disk]


def test_a_load_within_a_takeover_is_a_load(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    expected = pyint8.load(folder, "cpu")
    with pyint8.takeover():
        found = compare_models(pyint8.load(folder, "cpu"), expected)
    assert not found, show(found)


@pytest.mark.parametrize("fails", [False, True])
def test_a_takeover_ends(fails: bool) -> None:
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), pyint8.takeover(), pyint8.takeover():
        assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is not Bnb8BitHfQuantizer
        _ = 1 // (0 if fails else 1)
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is Bnb8BitHfQuantizer


def test_takeovers_may_overlap() -> None:
    """As blocks in two threads do: the first ends before the second."""
    first, second = pyint8.takeover(), pyint8.takeover()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is StreamedInt8HfQuantizer
    second.__exit__(None, None, None)
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is Bnb8BitHfQuantizer


@pytest.mark.parametrize("way", ["config", "takeover"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tensors_in_memory_are_left_to_transformers(name: str, way: str, checkpoints: CheckpointStore) -> None:
    model = ZOO[name]
    folder = checkpoints.folder(model, "bf16")
    memory = {
        "config": tf.AutoConfig.from_pretrained(folder),
        "state_dict": load_file(folder / "model.safetensors"),
        "device_map": CPU,
    }
    cls = {"llama": tf.LlamaForCausalLM, "gpt2": tf.GPT2LMHeadModel}[name]
    theirs = cls.from_pretrained(None, quantization_config=IN_8BIT, **memory)
    ours, _ = load_by(way, None, cls, pyint8.Int8Config(), **memory)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE])
    assert not found, show(found)
    assert remains(ours) == []


def test_what_transformers_does_not_do_with_tensors_in_memory_is_said(
    checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.folder(ZOO["mixtral"], "bf16")
    config, tensors = tf.AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    memory = {"config": config, "state_dict": tensors, "device_map": CPU}
    with pytest.raises(OptionError, match=r"has no int8 experts; save them, then load that checkpoint"):
        load_by("config", None, tf.MixtralForCausalLM, pyint8.Int8Config(experts=True), **memory)
    load_by("config", None, tf.MixtralForCausalLM, pyint8.Int8Config(), **memory)
    assert "does not look for values that int8 cannot hold" in caplog.text
    load_by("config", None, tf.MixtralForCausalLM, pyint8.Int8Config(strict=False), **memory)
    monkeypatch.setenv("PYINT8_EXPERTS", "1")
    load_by("takeover", None, tf.MixtralForCausalLM, pyint8.Int8Config(), **memory)
    told = [line.partition("which ")[2] for line in caplog.messages if "state_dict" in line]
    assert told == [
        "does not look for values that int8 cannot hold",
        "leaves experts in 16 bit, whatever PYINT8_EXPERTS says",
    ]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", ["config", "takeover"])
def test_an_interrupt_leaves_nothing(way: str, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in transformers' own code, while pyint8's threads read; Python's garbage collector is not waited for."""
    set_parameter, calls = core_model_loading.set_param_for_module, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return set_parameter(*args, **kwargs)

    monkeypatch.setattr(core_model_loading, "set_param_for_module", interrupted)
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    gc.collect()
    gc.disable()
    try:
        with suppress(KeyboardInterrupt):
            load_by(way, folder, tf.LlamaForCausalLM, pyint8.Int8Config())
        calls.clear()
        opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    finally:
        gc.enable()
    assert not [path for path in opened if path.startswith(str(folder))]


def test_an_index_that_lies(copy_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Code that asks for pyint8 gets an error; other code gets transformers' result and a warning."""
    folder = copy_of("llama_sharded", "bf16")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=name):
        load_by("config", folder, tf.LlamaForCausalLM, pyint8.Int8Config(), device_map=CPU)
    theirs, _ = peer_load(folder, tf.LlamaForCausalLM, device_map=CPU)
    ours, _ = load_by("takeover", folder, tf.LlamaForCausalLM, pyint8.Int8Config(), device_map=CPU)
    found = compare_models(ours, theirs, allow=[SERIALIZABLE])
    assert not found, show(found)
    assert f"tensor '{name}'" in caplog.text


class Curious(tf.LlamaForCausalLM):  # type: ignore[misc]
    """Some models look at how they will be quantized while they are built."""

    def __init__(self, config: tf.LlamaConfig) -> None:
        self.seen = [getattr(config.quantization_config, name) for name in ("load_in_8bit", "llm_int8_threshold")]
        super().__init__(config)


def test_a_model_may_look_at_its_quantization(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    config = pyint8.Int8Config(threshold=4.5)
    assert Curious.from_pretrained(folder, quantization_config=config, device_map=CPU).seen == [True, 4.5]
    assert pyint8.load(folder, "cpu", model=Curious, config=config).seen == [True, 4.5]
    int8 = checkpoints.folder(ZOO["llama"], PREQUANTIZED)
    assert pyint8.load(int8, "cpu", model=Curious).seen == [True, 6.0]


def test_four_bits_are_left_alone(checkpoints: CheckpointStore) -> None:
    with pyint8.takeover():
        assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__name__ == "Bnb4BitHfQuantizer"
        plain = tf.LlamaForCausalLM.from_pretrained(checkpoints.folder(ZOO["llama"], "bf16"))
    assert not getattr(plain, "is_loaded_in_8bit", False)


def test_bad_values_are_refused_or_warned_of(copy_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Who asks for pyint8 gets its strictness; who does not know of it, what transformers would do, and a word."""
    folder = copy_of("llama", "bf16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeightError, match="row 3 has NaN"):
        load_by("config", folder, tf.LlamaForCausalLM, pyint8.Int8Config(), device_map=CPU)
    load_by("takeover", folder, tf.LlamaForCausalLM, pyint8.Int8Config(), device_map=CPU)
    assert "NaN" in caplog.text


@pytest.mark.parametrize("way", ["config", "takeover", "load"])
def test_a_load_says_in_one_line_that_it_ended(
    way: str, checkpoints: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    with caplog.at_level("INFO", "pyint8"):
        if way == "load":
            pyint8.load(folder, "cpu")
        else:
            load_by(way, folder, tf.LlamaForCausalLM, pyint8.Int8Config(), device_map=CPU)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loaded ")]
    assert re.fullmatch(rf"loaded {folder}: 0\.000 GB in \d\.\d\d s \(.* GB/s\); tensors: 14 int8, 7 as stored", line)


def test_a_takeover_gives_the_reports_of_its_loads(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    pyint8.load(folder, "cpu")  # before
    with pyint8.takeover() as loads:
        assert loads == []
        tf.LlamaForCausalLM.from_pretrained(folder, device_map=CPU, quantization_config=IN_8BIT)
        _, mine = pyint8.load(folder, "cpu", return_report=True)
        with suppress(ValueError):
            pyint8.load(folder, "cpu", dtype="nonsense")  # did not end
    pyint8.load(folder, "cpu")  # after
    theirs, ours = loads
    assert ours is mine
    assert theirs.checkpoint_bytes == ours.checkpoint_bytes == open_checkpoint(folder).nbytes
    assert theirs.tensors == ours.tensors
    assert all(theirs.seconds[phase] > 0 for phase in ("read headers", "build", "stream", "finish"))
