"""What the verbs print is what the operations return."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import VOCAB, ZOO, CheckpointStore

import pyint8

pytestmark = pytest.mark.slow

Command = Callable[..., Any]

HUB = """
import huggingface_hub, huggingface_hub.errors

class HfApi:
    def create_repo(self, repository, *, private, exist_ok):
        import os
        print("made", repository, private, exist_ok, os.path.exists("int8"))
    def upload_folder(self, *, repo_id, folder_path):
        import os
        print("uploaded", sorted(os.listdir(folder_path)))
        {fails}
        return "https://hub/" + repo_id

huggingface_hub.HfApi = HfApi
"""


@pytest.fixture
def llama(checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO["llama"], "bf16")


def value_of(done: Any, code: int = 0) -> Any:
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


# --- inspect and plan -------------------------------------------------------------------------------------------------


def test_inspect(llama: Path, command: Command) -> None:
    expected = json.loads(json.dumps(pyint8.inspect(llama, max_memory={0: "1GB"}, dtype="float16").to_dict()))
    assert value_of(command("inspect", llama, "--max-memory", "0=1GB", "--dtype", "float16", "--json")) == expected
    done = command("inspect", llama, "--tensors")
    assert "as int8     98 kB (14 modules" in done.stdout
    assert "an embedding: model.embed_tokens" in done.stdout
    assert "fits        yes" in done.stdout
    assert all(tensor["name"] in done.stdout for tensor in expected["tensors"])


def test_inspect_a_plain_file(llama: Path, command: Command) -> None:
    file = llama / "model.safetensors"
    assert value_of(command("inspect", file, "--json"))["dtypes"] == {"BF16": pyint8.inspect(llama).nbytes}
    assert "no config.json" in command("inspect", file).stdout


def test_plan(llama: Path, command: Command) -> None:
    value = value_of(command("plan", llama, "--max-memory", "0=60KB,1=80KB", "--max-memory", "cpu=1GB", "--json"))
    found = pyint8.inspect(llama, max_memory={0: "60KB", 1: "80KB", "cpu": "1GB"})
    assert (value["fits"], value["device_map"]) == (True, found.device_map)
    used = found.device_bytes["1"]
    assert value["devices"]["1"] == {"used": used, "memory": 80_000, "left": 80_000 - used}
    assert value["devices"].keys() == {"0", "1", "cpu"}


def test_plan_says_no_by_3(llama: Path, command: Command) -> None:
    small = ("--max-memory", "0=60KB,cpu=1GB")
    value = value_of(command("plan", llama, *small, "--json"), code=3)
    assert value["fits"] is False
    assert "quantized on the CPU" in value["problem"]
    done = command("plan", llama, *small)
    assert done.returncode == 3
    assert "fits        no: " in done.stdout
    assert "try         --headroom 1GiB" in done.stdout
    assert "try   " not in command("plan", llama, *small, "--headroom", "1GiB").stdout
    assert command("plan", llama, *small, "--fp32-cpu-offload").returncode == 0


def test_there_is_no_plan_for_headers(llama: Path, command: Command) -> None:
    done = command("plan", llama / "model.safetensors")
    assert done.returncode == 1
    assert "there is no plan" in done.stderr
    done = command("inspect", llama, "--headers", "--experts")
    assert done.returncode == 1
    assert "config is about a model: headers alone were asked for; leave it out" in done.stderr


# --- convert ----------------------------------------------------------------------------------------------------------


def test_convert(llama: Path, checkpoints: CheckpointStore, command: Command, tmp_path: Path) -> None:
    words = ("convert", llama, tmp_path / "int8", "--device", "cpu", "--skip", "k_proj", "--skip", "lm_head")
    value = value_of(command(*words, "--max-shard-size", "60KB", "--json"))
    config = pyint8.Int8Config(skip_modules=["k_proj", "lm_head"])
    pyint8.convert(llama, tmp_path / "expected", device="cpu", config=config, max_shard_size="60KB")
    names = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "int8").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    for name in names:
        assert (tmp_path / "int8" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert (value["folder"], value["pushed"]) == (str(tmp_path / "int8"), None)
    assert value["report"]["tensors"]["int8"] == 12
    words = ("convert", checkpoints.folder(ZOO["mixtral"], "bf16"), "other", "--device", "cpu")
    assert "written" in command(*words, "--checksums", "--experts", "--fused-experts").stdout
    shapes = {tuple(value.shape) for value in load_file(tmp_path / "other" / "model.safetensors").values()}
    assert {(4, 96, 32), (4, 32, 48)} <= shapes  # experts, whole
    assert (tmp_path / "other" / "model.safetensors.crc32c.json").exists()
    assert not (tmp_path / "int8" / "model.safetensors.crc32c.json").exists()


def test_convert_pushes_what_it_wrote(llama: Path, command: Command, tmp_path: Path) -> None:
    words = ("convert", llama, "int8", "--device", "cpu", "--push-to-hub", "me/int8", "--private")
    done = command(*words, "--json", before=HUB.format(fails=""))
    assert value_of(done)["pushed"] == "https://hub/me/int8"
    said = [line for line in done.stderr.splitlines() if line.startswith(("made", "uploaded"))]
    assert said[0] == "made me/int8 True True False"  # before anything was converted
    assert said[1] == f"uploaded {sorted(path.name for path in (tmp_path / 'int8').iterdir())}"
    assert load_file(tmp_path / "int8" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("error", ["OSError", "huggingface_hub.errors.HTTPError"])
def test_a_push_that_fails_leaves_what_was_converted(error: str, llama: Path, command: Command, tmp_path: Path) -> None:
    words = ("convert", llama, "int8", "--device", "cpu", "--push-to-hub", "me/int8")
    done = command(*words, before=HUB.format(fails=f"raise {error}('the network is gone')"))
    assert done.returncode == 1
    assert "the network is gone; the folder is complete, so try again: `hf upload me/int8 int8`" in done.stderr
    assert (tmp_path / "int8" / "model.safetensors").exists()


def test_a_name_that_is_no_repository_is_refused_before_the_work(llama: Path, command: Command, tmp_path: Path) -> None:
    done = command("convert", llama, "int8", "--device", "cpu", "--push-to-hub", "a/b/c")
    assert done.returncode == 1
    assert "'a/b/c' names no repository" in done.stderr
    assert not (tmp_path / "int8").exists()


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def speaking(copy_of: Callable[..., Path]) -> Path:
    folder = copy_of("llama", "bf16")
    words = models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_load_generates_the_model_s_own_tokens(speaking: Path, command: Command) -> None:
    value = value_of(command("load", speaking, "--generate", "w5 w6 w7", "--tokens", 4, "--json"))
    model = pyint8.load(speaking)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0]
    assert value["generated"] == " ".join(f"w{int(token)}" for token in expected)
    assert len(expected) > 3
    assert value["model"] == "LlamaForCausalLM"
    assert value["report"]["tensors"]["int8"] == 14
    assert (
        f"generated   {value['generated']}" in command("load", speaking, "--generate", "w5 w6 w7", "--tokens", 4).stdout
    )


def test_load_says_why_it_cannot_generate(llama: Path, checkpoints: CheckpointStore, command: Command) -> None:
    bert = checkpoints.folder(ZOO["bert_mlm"], "bf16")
    for words, found in [
        ((llama, "--generate", "w5"), "the tokenizer in"),
        ((llama, "--generate", "w5", "--tokens", "0"), "tokens is 0"),
        ((bert, "--generate", "w5"), "BertForMaskedLM generates no text"),
    ]:
        done = command("load", *words)
        assert done.returncode == 1
        assert found in done.stderr


def test_load_places_and_quantizes_as_it_is_told(llama: Path, command: Command) -> None:
    value = value_of(
        command("load", llama, "--device-map", "cpu", "--dtype", "float32", "--skip", "down_proj", "--json")
    )
    assert value["report"]["tensors"] == {"int8": 13, "cast": 8}  # of a list of one's own, the head is not left out
    refused = command("load", llama, "--device-map", "cuda:99")
    assert refused.returncode == 1
    assert "cuda:99" in refused.stderr


# --- cache and timeline -----------------------------------------------------------------------------------------------


def test_load_with_a_cache_and_what_is_in_it(llama: Path, tmp_path: Path, command: Command) -> None:
    cache = tmp_path / "cache"
    load = ("load", llama, "--device-map", "cpu", "--cache", cache, "--json")
    assert [value_of(command(*load))["report"]["from_cache"] for _ in range(2)] == [False, True]
    (entry,) = value_of(command("cache", "list", "--folder", cache, "--json"))["list"]
    assert entry["source"] == str(llama)
    assert entry["nbytes"] == sum(file.stat().st_size for file in Path(entry["folder"]).glob("*.safetensors"))
    assert f"{llama}\n" in command("cache", "list", "--folder", cache).stdout
    assert "removed     1, " in command("cache", "clear", "--folder", cache).stdout
    assert value_of(command("cache", "list", "--folder", cache, "--json"))["list"] == []
    assert not list(cache.iterdir())


def test_the_users_cache(llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command("load", llama, "--device-map", "cpu", "--cache")
    value = value_of(command("cache", "list", "--json"))
    assert value["folder"] == str(tmp_path / "pyint8")
    assert len(value["list"]) == 1


def test_a_timeline(llama: Path, tmp_path: Path, command: Command) -> None:
    trace, picture = tmp_path / "load.json", tmp_path / "load.png"
    assert f"timeline    {picture}" in command("load", llama, "--device-map", "cpu", "--timeline", picture).stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    value = value_of(command("load", llama, "--device-map", "cpu", "--timeline", trace, "--json"))
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= {"reading", "build", "stream"}
    assert value["report"]["timeline"]["Python"]
    by_environment = "import os; os.environ['PYINT8_TIMELINE'] = '1'"
    value = value_of(command("load", llama, "--device-map", "cpu", "--json", before=by_environment))
    assert value["report"]["timeline"]["Python"]
    done = command("load", llama, "--timeline", tmp_path / "load.gif")
    assert done.returncode == 1
    assert "ends in no .png" in done.stderr


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify(llama: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "int8"
    pyint8.convert(llama, folder, device="cpu")
    value = value_of(command("verify", folder, "--against", llama, "--device", "cpu", "--json"))
    assert value["is_sound"]
    assert value["compared"] == value["tensors"]
    done = command("verify", folder)
    assert done.returncode == 0
    assert "sound       yes" in done.stdout
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.SCB"
    tensors[name][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = command("verify", folder)
    assert done.returncode == 3
    assert done.stdout.startswith(f"{name}, {folder / 'model.safetensors'}, byte ")
    (finding,) = value_of(command("verify", folder, "--json"), code=3)["findings"]
    assert finding["tensor"] == name
