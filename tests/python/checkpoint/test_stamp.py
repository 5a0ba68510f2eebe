"""Files that are replaced, or written to, between their header and the end of the load: never a mixture of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from streams import head_start, over
from torch import nn

import pyint8
from pyint8 import _core
from pyint8.checkpoint import Checkpoint, open_checkpoint, read_header, read_pickled, stamp
from pyint8.errors import FileChangedError
from pyint8.operations import load as operation
from pyint8.streaming.prefetch import PageCachePrefetch
from pyint8.streaming.reading import read_tensor
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

CPU = torch.device("cpu")
SAYS = "the file changed while it was loaded; load it again, once nothing writes to it"
FILE = "model.safetensors"
Copy = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("nothing_left")


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, {"format": "pt"})


def other_values(path: Path) -> bytes:
    """A file of the same size and header, with other values."""
    new = path.with_name("new")
    save(new, {name: tensor + 1 for name, tensor in load_file(path).items()})
    assert new.stat().st_size == path.stat().st_size
    return new.read_bytes()


def replaced(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(other_values(path))
    os.replace(new, path)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(other_values(path))


def once(change: Callable[[Path], None], path: Path) -> Callable[[], None]:
    """Changes the file when it is first called."""
    left = [change]
    return lambda: left.pop()(path) if left else None


def after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], None]) -> None:
    """Acts after every call of a function."""
    genuine = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = genuine(*args, **kwargs)
        act()
        return result

    monkeypatch.setattr(owner, name, call)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def load(folder: Path, **kwargs: Any) -> Any:
    return pyint8.load(folder, "cpu", dtype=torch.float16, **kwargs)


def drop_in(folder: Path) -> Any:
    kwargs: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float16}
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=pyint8.Int8Config(), **kwargs)


def fill(folder: Path) -> Any:
    return load(folder, model=module(), config=pyint8.Int8Config(skip_modules=[]))


@pytest.fixture(params=["load", "drop-in", "plain"])
def road(request: pytest.FixtureRequest, copy_of: Copy, tmp_path: Path) -> tuple[Callable[[Path], Any], Path]:
    """A way to load, and the folder that it loads."""
    if request.param != "plain":
        return {"load": load, "drop-in": drop_in}[request.param], copy_of("llama", "bf16")
    save(tmp_path / FILE, module().state_dict())
    return fill, tmp_path


Road = tuple[Callable[[Path], Any], Path]


def equal(model: Any, other: Any) -> bool:
    states = model.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[1][k], v) for k, v in states[0].items())


# --- on every road ----------------------------------------------------------------------------------------------------


def test_overwritten_while_it_is_read(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    way, folder = road
    after(monkeypatch, Transport, "file", once(overwritten, folder / FILE))
    with pytest.raises(FileChangedError, match=SAYS) as caught:
        way(folder)
    assert caught.value.path == str(folder / FILE)


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_changed_before_its_tensors_are_read(
    road: Road, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    way, folder = road
    before = once(change, folder / FILE)
    genuine = TensorStream.__init__

    def begin(*args: Any, **kwargs: Any) -> None:
        before()
        genuine(*args, **kwargs)

    monkeypatch.setattr(TensorStream, "__init__", begin)
    with pytest.raises(FileChangedError, match=SAYS) as caught:
        way(folder)
    assert caught.value.path == str(folder / FILE)


def test_a_module_of_ones_own_gets_its_layers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module()
    layers = list(own)  # type: ignore[call-overload]
    save(tmp_path / FILE, module().state_dict())
    after(monkeypatch, Transport, "file", once(overwritten, tmp_path / FILE))
    with pytest.raises(FileChangedError):
        load(tmp_path, model=own, config=pyint8.Int8Config(skip_modules=[]))
    assert list(own) == layers  # type: ignore[call-overload]


def test_replaced_while_the_old_file_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is read to its end."""
    save(tmp_path / FILE, module().state_dict())
    old = fill(tmp_path)
    after(monkeypatch, Transport, "file", once(replaced, tmp_path / FILE))
    assert equal(fill(tmp_path), old)
    assert not equal(fill(tmp_path), old)


# --- transformers, which opens files by itself ------------------------------------------------------------------------


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_changed_before_transformers_has_looked_at_it(
    copy_of: Copy, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the load had begun a moment later: the new header, and the new values."""
    folder = copy_of("llama", "bf16")
    old = load(folder)
    after(monkeypatch, operation, "find_checkpoint", once(change, folder / FILE))
    new = load(folder)
    assert not equal(new, old)
    assert equal(new, load(folder))


def test_early_tensors_of_the_file_as_it_was_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    options = pyint8.StreamOptions(threads=2)
    save(tmp_path / FILE, {"x": torch.zeros(1000)})
    start = head_start(list(open_checkpoint(tmp_path).values()), options=options)
    transport, early, _ = start.take()
    replaced(tmp_path / FILE)
    wanted = [TensorRequest(entry, CPU) for entry in open_checkpoint(tmp_path).values()]
    with over(wanted, transport, early) as stream:
        assert stream.whole("x").eq(1).all()


def test_replaced_by_one_with_other_names(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask for what the new one names, and initialize the rest."""
    folder = copy_of("llama", "bf16")

    def without_norm(path: Path) -> None:
        tensors = load_file(path)
        del tensors["model.norm.weight"]
        save(path.with_name("new"), tensors)
        os.replace(path.with_name("new"), path)

    after(monkeypatch, Transport, "file", once(without_norm, folder / FILE))
    with pytest.raises(FileChangedError, match=SAYS):
        load(folder)


def test_cut_before_transformers_opens_it(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("llama", "bf16")
    after(monkeypatch, Transport, "file", once(lambda path: os.truncate(path, 100), folder / FILE))
    with pytest.raises(FileChangedError, match="changed while it was loaded"):
        load(folder)


# --- what is left on the disk, or in memory ---------------------------------------------------------------------------


def test_replaced_before_accelerate_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / FILE, module().state_dict())
    after(monkeypatch, Transport, "file", once(replaced, tmp_path / FILE))
    config = pyint8.Int8Config(skip_modules=["2"], fp32_cpu_offload=True)
    device_map = {"0": "cpu", "1": "cpu", "2": "disk"}
    with pytest.raises(FileChangedError, match=SAYS):
        pyint8.load(tmp_path, device_map, model=module(), config=config, offload_folder=tmp_path / "offload")


def test_bytes_that_torch_reads_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    torch.save({"x": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    after(monkeypatch, torch, "load", lambda: os.utime(path, (1, 1)))
    with pytest.raises(FileChangedError, match=SAYS) as caught:
        read_pickled(path)
    assert caught.value.path == str(path)


def test_a_header_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE
    save(path, {"x": torch.zeros(1000)})
    changing = iter([lambda: None, lambda: os.utime(path, (1, 1))])
    genuine = stamp.stamp_of

    def look(file: Any) -> stamp.FileStamp:
        next(changing)()
        return genuine(file)

    monkeypatch.setattr(stamp, "stamp_of", look)
    with pytest.raises(FileChangedError, match=SAYS):
        read_header(path)


# --- whoever opens a file ---------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Of one tensor, in a file that was replaced since."""
    save(tmp_path / FILE, {"x": torch.zeros(5000)})
    found = open_checkpoint(tmp_path)
    replaced(tmp_path / FILE)
    return found


def test_one_entry_that_is_read_at_once(checkpoint: Checkpoint) -> None:
    with pytest.raises(FileChangedError, match=SAYS) as caught:
        read_tensor(checkpoint["x"])
    assert caught.value.path == checkpoint.files[0]
    assert read_tensor(replace(checkpoint["x"], stamp=None)).eq(1).all()


def test_reading_ahead(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.host.page_cache.is_cached", lambda *_: False)
    with pytest.raises(FileChangedError, match=SAYS):
        PageCachePrefetch(checkpoint, pyint8.StreamOptions())


def test_a_head_start(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    start = head_start(list(checkpoint.values()), options=pyint8.StreamOptions(threads=1))
    with pytest.raises(FileChangedError, match=SAYS):
        start.take()


def test_a_checkpoint_says_whether_it_is_what_it_was(tmp_path: Path) -> None:
    save(tmp_path / FILE, {"x": torch.zeros(5)})
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.has_changed
    checkpoint.require_unchanged(checkpoint.files)
    (tmp_path / FILE).unlink()
    assert checkpoint.has_changed
    with pytest.raises(FileChangedError, match=SAYS):
        checkpoint.require_unchanged(checkpoint.files)
    checkpoint.require_unchanged([])


@pytest.mark.parametrize("field", stamp.FileStamp._fields)
def test_the_extension_compares_every_field(checkpoint: Checkpoint, field: str) -> None:
    engine = _core.Engine(threads=1, slots_per_thread=1, slot_bytes=8192, direct_io=False)
    path = checkpoint.files[0]
    now = stamp.stamp_of(path)
    engine.add_file(path, now)
    with pytest.raises(FileChangedError, match=SAYS) as caught:
        engine.add_file(path, now._replace(**{field: getattr(now, field) + 1}))
    assert caught.value.path == path
    engine.require_unchanged()
    os.utime(path, (1, 1))
    with pytest.raises(FileChangedError, match=SAYS) as caught:
        engine.require_unchanged()
    assert caught.value.path == path
    engine.close()
