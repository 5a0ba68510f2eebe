"""A folder becomes a checkpoint: which file is found, and whether index and shards agree."""

import errno
import json
import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from pyint8.checkpoint import checkpoint_of_files, open_checkpoint
from pyint8.errors import CheckpointError, CheckpointNotFoundError, HeaderError, OptionError, ReadError

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {ONE: ["a", "b"], TWO: ["c"]}
BOTH = {ONE: ["a", "b"], TWO: ["b", "c"]}
WEIGHT_MAP = {"a": ONE, "b": ONE, "c": TWO}


def save(path, *names, metadata=None):
    save_file({name: torch.full((3,), float(ord(name[-1]))) for name in names}, path, metadata)


def sharded(folder, shards=None, weight_map=None, index=INDEX):
    """Write shards {file: tensors} and an index; returns the folder as text."""
    for shard, names in (SHARDS if shards is None else shards).items():
        save(folder / shard, *names, metadata={"format": "pt", "of": shard})
    made = {"metadata": {"total_size": 10**30}, "weight_map": WEIGHT_MAP if weight_map is None else weight_map}
    (folder / index).write_text(json.dumps(made))
    return str(folder)


def test_a_single_file_is_found_before_an_index(tmp_path):
    folder = sharded(tmp_path)
    save(tmp_path / "model.safetensors", "z")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.files == (os.path.join(folder, "model.safetensors"),)
    assert list(checkpoint) == ["z"]


def test_shards_are_one_checkpoint(tmp_path):
    folder = sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == (os.path.join(folder, ONE), os.path.join(folder, TWO))
    assert {name: os.path.basename(entry.path) for name, entry in checkpoint.items()} == WEIGHT_MAP
    assert checkpoint.metadata == {"format": "pt", "of": ONE}
    assert (len(checkpoint), checkpoint.nbytes) == (3, 36)
    assert "a" in checkpoint
    assert "z" not in checkpoint
    assert checkpoint["a"] is checkpoint.entries["a"]
    with pytest.raises(KeyError):
        checkpoint["z"]
    assert checkpoint_of_files(checkpoint.files).entries == checkpoint.entries


def test_what_transformers_saves_in_shards_is_opened(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB", variant="small")
    checkpoint = open_checkpoint(tmp_path, variant="small")
    assert len(checkpoint.files) > 2
    assert {name: entry.torch_shape for name, entry in checkpoint.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    for name, entry in checkpoint.items():
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            assert file.read(entry.nbytes) == model.state_dict()[name].numpy().tobytes()


def test_subfolder_and_variant_choose_the_file(tmp_path):
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "model.fp16.safetensors", "v")
    save(tmp_path / "sub" / "model.safetensors", "s")
    assert list(open_checkpoint(tmp_path, subfolder="sub")) == ["s"]
    assert list(open_checkpoint(tmp_path, subfolder="sub", variant="fp16")) == ["v"]
    sharded(tmp_path, index="model.safetensors.index.fp16.json")
    assert len(open_checkpoint(tmp_path, variant="fp16").files) == 2
    with pytest.raises(CheckpointNotFoundError, match=r"none of model\.safetensors, .*pass variant=\"fp16\""):
        open_checkpoint(tmp_path)
    with pytest.raises(OptionError, match="subfolder and variant are for a folder"):
        open_checkpoint(tmp_path / ONE, variant="fp16")


def test_a_single_file_of_any_name_is_a_checkpoint(tmp_path):
    save(tmp_path / "blob", "x")
    assert list(open_checkpoint(tmp_path / "blob")) == ["x"]
    os.symlink(tmp_path / "blob", tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["x"]


def test_the_tensor_at_a_byte(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(3), "none": torch.zeros(0), "b": torch.zeros(5, dtype=torch.int8)}, path)
    checkpoint = open_checkpoint(path)
    held = {name: set(range(entry.offset, entry.offset + entry.nbytes)) for name, entry in checkpoint.items()}
    for offset in range(-1, os.path.getsize(path) + 2):
        assert checkpoint.tensor_at(path, offset) == next((n for n, held_by in held.items() if offset in held_by), None)
    assert checkpoint.tensor_at("elsewhere", checkpoint["a"].offset) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tf_model.h5", "holds TensorFlow weights.* transformers 4 and from_tf=True"),
        ("flax_model.msgpack", "holds Flax weights.* transformers 4 and from_flax=True"),
        ("llama-q4.gguf", "holds GGUF weights.*gguf_file"),
    ],
)
def test_other_formats_are_named_with_how_to_convert_them(tmp_path, name, words):
    (tmp_path / "training_args.bin").touch()
    (tmp_path / name).touch()
    with pytest.raises(
        CheckpointNotFoundError, match=rf"none of model\.safetensors, {INDEX}, .*: {name} {words}"
    ) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == str(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=f"no safetensors file: {name} {words}"):
        open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointNotFoundError, match=f"no safetensors file: {name} {words}"):
        checkpoint_of_files([str(tmp_path / name)])


def test_nothing_is_said_with_what_was_looked_for(tmp_path):
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(CheckpointNotFoundError, match=rf"none of model\.safetensors, {INDEX}, .*; check the path"):
        open_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointNotFoundError,
        match=r"none of model\.x\.safetensors, model\.safetensors\.index\.x\.json, pytorch_model\.x\.bin, ",
    ):
        open_checkpoint(tmp_path, variant="x")
    for absent in (tmp_path / "absent", tmp_path / "training_args.bin" / "below"):
        with pytest.raises(CheckpointNotFoundError, match="no such file or folder") as caught:
            open_checkpoint(absent)
        assert caught.value.path == str(absent)
    os.symlink(tmp_path / "gone", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"model\.safetensors is no file, or a link to one that is gone"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint file was given"):
        checkpoint_of_files([])


def test_a_folder_without_permission_is_a_read_error(tmp_path):
    folder = sharded(tmp_path)
    tmp_path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(ReadError, match="permission") as caught:
            open_checkpoint(folder)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert caught.value.errno == errno.EACCES
    assert caught.value.path in (folder, os.path.join(folder, "model.safetensors"))


def test_a_missing_shard_is_named_with_the_index_and_its_first_tensors(tmp_path):
    names = [f"layer.{i}" for i in range(5)]
    folder = sharded(tmp_path, {ONE: ["a"]}, {"a": ONE, **dict.fromkeys(names, TWO)})
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_checkpoint(folder)
    assert caught.value.path == os.path.join(folder, TWO)
    assert f"{os.path.join(folder, INDEX)} says that it holds layer.0, layer.1, layer.2 and 2 more" in str(caught.value)


@pytest.mark.parametrize(
    ("shards", "weight_map", "tensor", "shard", "words"),
    [
        (SHARDS, {**WEIGHT_MAP, "d": ONE}, "d", ONE, "says that the file holds this tensor, but no shard has it"),
        (SHARDS, {**WEIGHT_MAP, "b": TWO}, "b", TWO, "says that the file holds this tensor, but it is in "),
        (SHARDS, {"a": ONE, "c": TWO}, "b", ONE, "does not name this tensor, but the file holds it"),
        (BOTH, WEIGHT_MAP, "b", TWO, f"the tensor is in .*{ONE} too, where .*{INDEX} says that it is"),
        (BOTH, {**WEIGHT_MAP, "b": TWO}, "b", ONE, f"the tensor is in .*{TWO} too, where .*{INDEX} says that it is"),
        (BOTH, {"a": ONE, "c": TWO}, "b", TWO, "does not name this tensor, but the file holds it"),
    ],
    ids=["nowhere", "elsewhere", "not named", "twice, the first counts", "twice, the last counts", "twice, not named"],
)
def test_what_index_and_shards_do_not_agree_about(tmp_path, shards, weight_map, tensor, shard, words):
    folder = sharded(tmp_path, shards, weight_map)
    given = checkpoint_of_files([os.path.join(folder, name) for name in SHARDS])
    for checkpoint in (open_checkpoint(folder), given):
        (found,) = checkpoint.disagreements
        assert (found.name, found.path) == (tensor, os.path.join(folder, shard))
        assert found.is_settled == (shards is BOTH and tensor in weight_map)
        assert checkpoint.absent == (["d"] if tensor == "d" else [])
        error = found.error("; or so")
        assert isinstance(error, CheckpointError)
        assert re.search(rf"{words}.*; the index and its shards .*: download them again; or so$", str(error))
        assert os.path.join(folder, INDEX) in str(error)
        assert (error.tensor, error.path, error.offset) == (found.name, found.path, found.offset)


@pytest.mark.parametrize("counts", [ONE, TWO])
def test_of_two_copies_the_one_that_the_index_names_counts(tmp_path, counts):
    folder = sharded(tmp_path, BOTH, {**WEIGHT_MAP, "b": counts})
    checkpoint = open_checkpoint(folder)
    assert checkpoint["b"].path == os.path.join(folder, counts)
    assert list(checkpoint) == ["a", "b", "c"]
    assert [(entry.path, entry.offset) for entry in checkpoint.values()] == sorted(
        (entry.path, entry.offset) for entry in checkpoint.values()
    )
    assert checkpoint.nbytes == 36


def test_of_two_copies_without_an_index_the_last_counts(tmp_path):
    folder = sharded(tmp_path, BOTH)
    os.unlink(os.path.join(folder, INDEX))
    checkpoint = checkpoint_of_files([os.path.join(folder, name) for name in SHARDS])
    assert checkpoint["b"].path == os.path.join(folder, TWO)
    (found,) = checkpoint.disagreements
    assert not found.is_settled
    assert "too, and no index says which counts" in found.problem


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    held=st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=3),
    change=st.dictionaries(st.sampled_from("abcde"), st.integers(0, 2), max_size=3),
    dropped=st.sets(st.sampled_from("abcde"), max_size=1),
)
def test_the_index_decides_and_what_it_gets_wrong_is_known(tmp_path, held, change, dropped):
    for old in tmp_path.iterdir():
        old.unlink()
    shards = {f"{i}.safetensors": sorted(names) for i, names in enumerate(held)}
    claim = {name: shard for shard, names in shards.items() for name in names}
    claim |= {name: f"{i}.safetensors" for name, i in change.items() if i < len(held)}
    claim = {name: shard for name, shard in claim.items() if name not in dropped}
    if set(claim.values()) != shards.keys():
        return
    checkpoint = open_checkpoint(sharded(tmp_path, shards, claim))
    holders = {name: [shard for shard in shards if name in shards[shard]] for name in "abcde"}
    for name, found_in in holders.items():
        if found_in:
            counts = claim.get(name) if claim.get(name) in found_in else found_in[-1]
            assert os.path.basename(checkpoint[name].path) == counts
    named = {name: [claim[name]] if name in claim else [] for name in holders}
    assert {found.name for found in checkpoint.disagreements} == {
        name for name in named if named[name] != holders[name]
    }
    assert {found.name for found in checkpoint.disagreements if found.is_settled} == {
        name for name, found_in in holders.items() if len(found_in) > 1 and claim.get(name) in found_in
    }
    assert set(checkpoint.absent) == {name for name in claim if not holders[name]}


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../other.safetensors", "..", ".", "", "sub/x", "a\\b", "a\0b", 1, None]
)
def test_an_index_may_not_leave_its_folder(tmp_path, shard):
    folder = sharded(tmp_path, weight_map={**WEIGHT_MAP, "a": shard})
    with pytest.raises(CheckpointError, match="not the plain name of a file") as caught:
        open_checkpoint(folder)
    assert (caught.value.tensor, caught.value.path) == ("a", os.path.join(folder, INDEX))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"weight_map":{"a":"x","a":"y"}}', "key 'a' appears twice"),
        (b'{"weight_map":{"a":"x"},"weight_map":{}}', "key 'weight_map' appears twice"),
        (b'{"weight_map":' + b"[" * 10**6, "nested deeper"),
        (b"[]", "not a JSON object with a non-empty object `weight_map`"),
        (b"{}", "not a JSON object with a non-empty object `weight_map`"),
        (b'{"weight_map":{}}', "not a JSON object with a non-empty object `weight_map`"),
        (b'{"weight_map":["a"]}', "not a JSON object with a non-empty object `weight_map`"),
    ],
    ids=["empty", "utf-8", "twice", "twice-top", "deep", "list", "no-map", "empty-map", "list-map"],
)
def test_a_broken_index_is_refused(tmp_path, text, words):
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == str(tmp_path / INDEX)


def test_given_files_need_no_index_and_an_index_of_others_is_not_theirs(tmp_path, monkeypatch):
    sharded(tmp_path, weight_map={"a": ONE, "b": ONE})
    monkeypatch.chdir(tmp_path)
    assert list(checkpoint_of_files([TWO, f".//{ONE}"])) == ["c", "a", "b"]
    assert list(checkpoint_of_files([ONE])) == ["a", "b"]
    assert list(checkpoint_of_files([TWO])) == ["c"]
    sharded(tmp_path)
    assert checkpoint_of_files([f".//{TWO}", f".//{ONE}"]).files == (f".//{TWO}", f".//{ONE}")
    (tmp_path / "other.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"')
    assert len(checkpoint_of_files([ONE, TWO])) == 3
    (tmp_path / "broken.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{ONE}"')
    with pytest.raises(CheckpointError, match=r"^broken\.safetensors\.index\.json, byte 55: the index: not valid JSON"):
        checkpoint_of_files([ONE, TWO])
    with pytest.raises(CheckpointNotFoundError, match="absent: there is no such file"):
        checkpoint_of_files([ONE, "absent"])


def test_a_broken_shard_is_the_header_s_error(tmp_path):
    folder = sharded(tmp_path)
    (tmp_path / TWO).write_bytes(b"\0" * 8)
    with pytest.raises(HeaderError) as caught:
        open_checkpoint(folder)
    assert caught.value.path == os.path.join(folder, TWO)
