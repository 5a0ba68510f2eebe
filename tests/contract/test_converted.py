"""`pyint8.convert` writes what `pyint8.load` and then `pyint8.save` write, to the byte, whatever comes between."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_disk import on_a_small_disk
from zoo import PREQUANTIZED, ZOO, CheckpointStore, ZooModel, checkpoint_store

import pyint8
from pyint8.errors import NonFiniteWeightError, OptionError, Pyint8Error, ReadError, WriteError
from pyint8.models import converted_files
from pyint8.models.transformers import converting
from pyint8.streaming.write_behind import WriteBehind

pytestmark = pytest.mark.slow

CPU = {"": "cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    return checkpoint_store(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def llama(store: CheckpointStore) -> Path:
    return store.folder(ZOO["llama_sharded"], "bf16")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded_and_saved(source: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    size = options.pop("max_shard_size", "5GB")
    torch.manual_seed(0)  # of weights that the checkpoint lacks
    pyint8.save(pyint8.load(source, CPU, **options), folder, max_shard_size=size)
    return files(folder)


def converted(source: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    torch.manual_seed(0)
    pyint8.convert(source, folder, device="cpu", **options)
    return files(folder)


def nothing_beside(folder: Path) -> bool:
    return os.listdir(folder.parent) == [folder.name]


# --- the same files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16", "fp32", PREQUANTIZED])
@pytest.mark.parametrize("zoo_model", ZOO.values(), ids=list(ZOO))
def test_every_architecture(zoo_model: ZooModel, kind: str, store: CheckpointStore, tmp_path: Path) -> None:
    source = store.folder(zoo_model, kind)
    for size in ("5GB", "60KB"):
        ours = converted(source, tmp_path / f"ours {size}", max_shard_size=size)
        assert ours == loaded_and_saved(source, tmp_path / f"saved {size}", max_shard_size=size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_dtypes(name: str, dtype: torch.dtype | None, store: CheckpointStore, tmp_path: Path) -> None:
    source = store.folder(ZOO[name], "bf16")
    assert converted(source, tmp_path / "a", dtype=dtype) == loaded_and_saved(source, tmp_path / "b", dtype=dtype)


def test_what_is_skipped(llama: Path, tmp_path: Path) -> None:
    config = pyint8.Int8Config(skip_modules=["k_proj", "lm_head"], threshold=3.0)
    assert converted(llama, tmp_path / "a", config=config) == loaded_and_saved(llama, tmp_path / "b", config=config)


@pytest.mark.parametrize("alike", [True, False])
def test_a_tied_head_that_the_checkpoint_has_too(store: CheckpointStore, tmp_path: Path, alike: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files(store.folder(ZOO["llama_tied"], "bf16")).items():
        (source / name).write_bytes(content)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if alike else 1)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ours = converted(source, tmp_path / "a")
    assert ours == loaded_and_saved(source, tmp_path / "b")
    assert ("lm_head.weight" in load_file(tmp_path / "a" / "model.safetensors")) != alike


def test_pickled_checkpoints(store: CheckpointStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    folder = store.folder(ZOO["gpt2"], "bf16")
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), source / "pytorch_model.bin")
    assert converted(source, tmp_path / "a") == loaded_and_saved(source, tmp_path / "b")


def test_what_came_of_it_loads(llama: Path, tmp_path: Path) -> None:
    report = pyint8.convert(llama, tmp_path / "int8", device="cpu")
    assert report.tensors["int8"]
    again, model = pyint8.load(tmp_path / "int8", CPU), pyint8.load(llama, CPU)
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.state_dict().items())


def test_little_is_in_memory_at_a_time(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0

    class Watched(WriteBehind):
        def put(self, tensor: torch.Tensor, write: Any) -> Any:
            nonlocal most
            future = super().put(tensor, write)
            most = max(most, self._bytes)
            return future

    monkeypatch.setattr(converted_files, "WriteBehind", Watched)
    monkeypatch.setattr(converted_files, "MOST_BYTES", 5000)
    ours = converted(llama, tmp_path / "a")
    assert ours == loaded_and_saved(llama, tmp_path / "b")
    assert most <= max(5000, *(tensor.nbytes for tensor in load_file(tmp_path / "a" / "model.safetensors").values()))


# --- interruptions ----------------------------------------------------------------------------------------------------


class Interrupted:
    """Lets so many tensors be written, then raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
        self._after, self.written = after, 0
        # A copy: one that is raised keeps all that was on the stack, as long as the parameters of tests are kept.
        self._error = copy.copy(error)
        self._put = WriteBehind.put
        monkeypatch.setattr(WriteBehind, "put", lambda behind, *args: self.put(behind, *args))
        monkeypatch.setattr(converted_files, "_NOTED_BYTES", 1)

    def put(self, behind: WriteBehind, *args: Any) -> Any:
        if self.written == self._after:
            raise self._error
        self.written += 1
        future = self._put(behind, *args)
        future.result()
        return future


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ReadError("the network is gone", errno=errno.EIO)])
def test_an_interrupted_one_is_gone_on_with(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    expected, target = loaded_and_saved(llama, tmp_path / "expected"), tmp_path / "work" / "int8"
    with monkeypatch.context() as patch:
        Interrupted(patch, 30, error)
        with pytest.raises(type(error)):
            pyint8.convert(llama, target, device="cpu")
    assert not target.exists()
    counting = Interrupted(monkeypatch, -1, error)
    assert converted(llama, target) == expected
    assert 0 < counting.written < 40  # of 49
    assert nothing_beside(target)


def test_other_work_is_not_gone_on_with(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "work" / "int8"
    with monkeypatch.context() as patch:
        Interrupted(patch, 30, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pyint8.convert(llama, target, device="cpu")
    ours = converted(llama, target, dtype=torch.float16)
    assert ours == loaded_and_saved(llama, tmp_path / "expected", dtype=torch.float16)


@pytest.mark.parametrize("error", [WriteError("full", errno=errno.ENOSPC), RuntimeError("anything")])
def test_an_error_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    target = tmp_path / "work" / "int8"
    target.mkdir(parents=True)
    (target / "mine").write_text("mine")
    Interrupted(monkeypatch, 30, error)
    with pytest.raises(type(error)):
        pyint8.convert(llama, target, device="cpu")
    assert files(target) == {"mine": b"mine"}
    assert nothing_beside(target)


def test_a_full_disk(llama: Path, tmp_path: Path) -> None:
    ran = on_a_small_disk(tmp_path, f'pyint8.convert("{llama}", f"{{disk}}/int8", device="cpu")', size="64k")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith(f"{errno.ENOSPC}|tensor '"), ran.stdout
    assert "No space left on device" in ran.stdout
    assert len(ran.stdout.splitlines()) == 1, "files were left"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_refused(llama: Path, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"folder": llama}, "the source itself"),
        ({"folder": ""}, "folder is empty"),
        ({"folder": 3}, "folder is 3"),
        ({"config": pyint8.Int8Config(has_fp16_weight=True)}, "nothing to convert"),
        ({"device": "nowhere"}, "device is"),
        ({"max_shard_size": 0}, "max_shard_size"),
        ({"ignore_mismatched_sizes": True}, "load, then save"),
        ({"options": 3}, "options is"),
        ({"dtype": "int8"}, "dtype is"),
    ]
    for arguments, found in refused:
        with pytest.raises(OptionError, match=found):
            pyint8.convert(**{"source": llama, "folder": tmp_path / "int8", "device": "cpu", **arguments})
    assert not os.listdir(tmp_path)


def test_two_do_not_write_to_one_folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = converting.Conversion.run

    def again(*args: Any) -> None:
        with pytest.raises(OptionError, match="another process is writing"):
            pyint8.convert(llama, tmp_path / "int8", device="cpu")
        run(*args)

    monkeypatch.setattr(converting.Conversion, "run", again)
    pyint8.convert(llama, tmp_path / "int8", device="cpu")


def test_a_bad_weight_is_named(store: CheckpointStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files(store.folder(ZOO["llama"], "bf16")).items():
        (source / name).write_bytes(content)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeightError, match="row 3") as raised:
        pyint8.convert(source, tmp_path / "work" / "int8", device="cpu")
    assert raised.value.tensor == "model.layers.1.mlp.up_proj.weight"
    assert not os.listdir(tmp_path / "work")


def test_a_truncated_shard_is_named(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files(llama).items():
        (source / name).write_bytes(content)
    last = max(source.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 5)
    with pytest.raises(Pyint8Error) as raised:
        pyint8.convert(source, tmp_path / "int8", device="cpu")
    assert raised.value.path == str(last)
    assert os.listdir(tmp_path) == ["source"]
