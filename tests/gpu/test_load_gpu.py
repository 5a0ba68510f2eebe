"""A load on a real device: its memory, its offloads, several devices, and that a bad weight is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from oracle import compare_models, show
from safetensors.torch import load_file, save_file
from torch_state import default_dtype
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import Int8Config, StreamOptions, _core
from pyint8.errors import NonFiniteWeightError, PlacementError

MIB = 1 << 20


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with weights larger than the scratch that the tests below allow."""
    folder = tmp_path_factory.mktemp("wide")
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


@pytest.mark.parametrize("scratch", [16 * MIB, 256 * MIB])
def test_memory_is_the_model_and_the_scratch(wide_llama: Path, scratch: int) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = pyint8.load(wide_llama, device_map={"": 0}, options=StreamOptions(device_scratch=scratch))
    final = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= final + scratch + 16 * MIB
    assert _core.pinned_bytes_in_use() == 0
    tensors = [*model.parameters(), *model.buffers()]
    scales = [tensor.SCB for tensor in tensors if getattr(tensor, "SCB", None) is not None]
    assert final <= sum(tensor.nbytes + 512 for tensor in (*tensors, *scales))  # as the allocator rounds
    del model


def test_bands_give_the_bytes_of_the_whole(wide_llama: Path) -> None:
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        wide_llama, device_map={"": 0}, dtype=torch.float16, quantization_config=quantization
    )
    ours = pyint8.load(
        wide_llama, device_map={"": 0}, dtype=torch.float16, options=StreamOptions(device_scratch=16 * MIB)
    )
    found = compare_models(ours, theirs, allow=("modules//attributes/is_8bit_serializable",))
    assert not found, show(found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_a_bad_weight_is_told(checkpoints: CheckpointStore, tmp_path: Path, name: str, value: float) -> None:
    source = checkpoints.folder(ZOO[name], "bf16")
    for path in Path(source).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    weight = next(key for key in tensors if key.endswith(("q_proj.weight", "c_attn.weight")))
    tensors[weight][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    row = 4 if name == "gpt2" else 3
    with pytest.raises(NonFiniteWeightError, match=rf"row {row} ") as caught:
        pyint8.load(tmp_path, device_map={"": 0})
    assert caught.value.tensor == weight or caught.value.tensor.endswith(weight)
    pyint8.load(tmp_path, device_map={"": 0}, strict=False)


def test_a_module_on_the_cpu_needs_leave(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "lm_head": 0}
    device_map["model.rotary_emb"] = 0
    with pytest.raises(PlacementError, match="fp32_cpu_offload"):
        pyint8.load(folder, device_map=device_map)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_is_as_transformers_does_it(checkpoints: CheckpointStore, tmp_path: Path, place: str) -> None:
    folder = checkpoints.folder(ZOO["llama"], "bf16")
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": place, "model.norm": 0, "lm_head": 0}
    device_map["model.rotary_emb"] = 0
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    shared = {"device_map": device_map, "dtype": torch.float16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, offload_folder=tmp_path / "theirs", **shared
    )
    ours = pyint8.load(folder, config=Int8Config(fp32_cpu_offload=True), offload_folder=tmp_path / "ours", **shared)
    assert not list((tmp_path / "ours").glob("*.dat"))
    tokens = torch.arange(2, 34)[None].to(0)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_takes_no_more_memory_than_its_parts(wide_llama: Path, tmp_path: Path, place: str) -> None:
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": place, "model.norm": 0, "lm_head": 0}
    device_map["model.rotary_emb"] = 0
    on_gpu = sum(
        tensor.numel() * (1 if "proj" in name else 2)
        for name, tensor in load_all(wide_llama).items()
        if "layers.1." not in name
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = pyint8.load(
        wide_llama,
        device_map=device_map,
        config=Int8Config(fp32_cpu_offload=True),
        offload_folder=tmp_path / "offload",
        options=StreamOptions(device_scratch=16 * MIB),
    )
    assert torch.cuda.max_memory_allocated() - before <= on_gpu + 32 * MIB
    assert not list((tmp_path / "offload").glob("*.dat"))  # the checkpoint itself is read again
    with torch.no_grad():
        assert model(torch.arange(2, 34)[None].to(0)).logits.isfinite().all()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_takes_no_more_of_the_host_than_its_parts(wide_llama: Path, tmp_path: Path, place: str) -> None:
    program = f"""
import torch, transformers, pyint8.models.transformers.loading
from pyint8 import Int8Config
torch.zeros(1, device="cuda")
device_map = {{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": {place!r}, "model.norm": 0}}
device_map |= {{"model.rotary_emb": 0, "lm_head": 0}}
config = Int8Config(fp32_cpu_offload=True)
_, report = pyint8.load({str(wide_llama)!r}, device_map, config=config, offload_folder="offload", return_report=True)
print(report.host_peak_bytes)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    offloaded = sum(tensor.nbytes for name, tensor in load_all(wide_llama).items() if "layers.1." in name)
    assert int(done.stdout.split()[-1]) <= (2.2 * offloaded if place == "cpu" else 0) + 512 * MIB


@pytest.mark.parametrize("checkpoint", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_the_c_function_and_the_operator_make_the_same(
    checkpoints: CheckpointStore, name: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.folder(ZOO[name], checkpoint)
    by_c, report = pyint8.load(folder, 0, model=ZOO[name].cls, return_report=True)
    monkeypatch.setattr("pyint8.models.transformers.parameters.find_entry_point", lambda: None)
    by_operator, other = pyint8.load(folder, 0, model=ZOO[name].cls, return_report=True)
    assert report.quantized_by["cint8_vector_quant"] > 0
    assert other.quantized_by == {"int8_vectorwise_quant": sum(report.quantized_by.values())}
    left, right = by_c.state_dict(), by_operator.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_compiled_forward(checkpoints: CheckpointStore) -> None:
    model = pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), device_map={"": 0})
    tokens = torch.arange(2, 34)[None].to(0)
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(torch.compile(model, backend="aot_eager")(tokens).logits, expected)


def test_what_is_tied_is_compared_once_it_has_come(tmp_path: Path) -> None:
    """transformers ties the two if they are equal; reads are so slow that the last is long in coming."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=16, vocab_size=32000
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    slow = StreamOptions(threads=1, slots_per_thread=1, slot_bytes=8192)
    ours = pyint8.load(tmp_path, device_map={"": 0}, options=slow)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(ours.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_two_devices_are_as_transformers_has_them(checkpoints: CheckpointStore, name: str) -> None:
    folder = checkpoints.folder(ZOO[name], "bf16")
    shared = {"device_map": "balanced", "dtype": torch.float16}
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, **shared)
    ours = pyint8.load(folder, **shared)
    assert ours.hf_device_map == theirs.hf_device_map
    for (left, mine), (right, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert left == right
        assert mine.device == other.device
        assert torch.equal(mine, other)
    tokens = torch.arange(2, 34)[None].to(0)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_default_dtype_makes_no_difference(checkpoints: CheckpointStore, name: str) -> None:
    folder = checkpoints.folder(ZOO[name], "bf16")
    expected = dict(pyint8.load(folder, 0).named_parameters())
    with default_dtype(torch.bfloat16):
        found = dict(pyint8.load(folder, 0).named_parameters())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_first_use_of_a_device_in_a_process(checkpoints: CheckpointStore) -> None:
    program = "import sys, pyint8; print(pyint8.load(sys.argv[1], return_report=True)[1])"
    folder = str(checkpoints.folder(ZOO["gpt2"], "bf16"))
    done = subprocess.run([sys.executable, "-c", program, folder], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cuda:0" in done.stdout


def test_headroom_keeps_a_model_on_the_gpu(wide_llama: Path) -> None:
    """Where the planned map would put a part of it on the CPU, which int8 refuses."""
    model = pyint8.load(wide_llama, device_map={"": 0})
    tensors = [*model.parameters(), *model.buffers()]
    scales = [tensor.SCB for tensor in tensors if getattr(tensor, "SCB", None) is not None]
    need = sum(tensor.nbytes for tensor in (*tensors, *scales))
    del model, tensors, scales
    memory = {0: need, "cpu": 64 << 30}
    with pytest.raises((PlacementError, ValueError)):
        pyint8.load(wide_llama, device_map="auto", max_memory=memory)
    model = pyint8.load(wide_llama, device_map="auto", max_memory=memory, headroom="1GiB")
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}
    assert model(torch.tensor([[1, 2, 3]], device="cuda")).logits.isfinite().all()
