"""What goes to the disk is written so that a full disk is an error, and read as accelerate's own files are."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.offload import load_offloaded_weight, offload_weight
from safetensors.torch import load_file
from small_disk import on_a_small_disk
from torch import nn

import pyint8
from pyint8.errors import OptionError, WriteError
from pyint8.placement import offload as offloading
from pyint8.placement.dispatch import dispatch
from pyint8.placement.offload import check_folder, offload

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), ()], ids=str)
def test_accelerate_reads_it_and_would_have_written_it(dtype: torch.dtype, shape: Any, tmp_path: Path) -> None:
    value = torch.randint(0, 2, shape).to(dtype)
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    offload(value, "a.weight", str(tmp_path / "ours"), ours)
    (tmp_path / "theirs").mkdir()
    offload_weight(value, "a.weight", str(tmp_path / "theirs"), theirs)
    assert ours == theirs
    assert (tmp_path / "ours/a.weight.dat").read_bytes() == (tmp_path / "theirs/a.weight.dat").read_bytes()
    read = load_offloaded_weight(str(tmp_path / "ours/a.weight.dat"), ours["a.weight"])
    assert torch.equal(read.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    assert os.listdir(tmp_path / "ours") == ["a.weight.dat"]


def test_an_empty_one_and_a_transposed_one(tmp_path: Path) -> None:
    index: dict[str, Any] = {}
    for name, value in {"empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).t()}.items():
        offload(value, name, str(tmp_path), index)
        assert torch.equal(load_offloaded_weight(str(tmp_path / f"{name}.dat"), index[name]), value)


PLAIN = """module = nn.Sequential(*(nn.Linear(512, 256) for _ in range(6)))
    module[0].share = nn.Linear(512, 256)
    torch.save(module.state_dict(), f"{disk}/../w.bin")
    config = pyint8.Int8Config(fp32_cpu_offload=True)
    maps = {"": "disk", "5": "cpu"}
    pyint8.load(f"{disk}/../w.bin", maps, model=module, config=config, offload_folder=f"{disk}/offload")"""

PRETRAINED = """config = pyint8.Int8Config(fp32_cpu_offload=True)
    maps = {"": "cpu", "model.layers.1": "disk"}
    pyint8.load(FOLDER, maps, config=config, offload_folder=f"{disk}/offload")"""


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    ran = on_a_small_disk(tmp_path, PLAIN)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith(f"{errno.ENOSPC}|tensor '")
    assert "No space left on device; free some space, or choose a folder on another disk" in ran.stdout
    assert len(ran.stdout.splitlines()) == 1, "files were left"


def test_whatever_fails_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    written, write = [], offloading._write

    def fail_the_third_time(path: str, raw: memoryview) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, raw)

    monkeypatch.setattr(offloading, "_write", fail_the_third_time)
    (tmp_path / "other.dat").write_text("not ours")
    with pytest.raises(KeyboardInterrupt):
        dispatch(module, {"0": "disk", "1": "disk"}, str(tmp_path), {})
    assert os.listdir(tmp_path) == ["other.dat"]


@pytest.mark.parametrize("folder", [7, "a file", "nul\0"])
def test_what_is_no_folder_is_refused(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    with pytest.raises(OptionError, match=r"offload_folder is .* (folder|new one)$"):
        check_folder(folder)


def test_a_folder_that_cannot_be_made(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    config = pyint8.Int8Config(fp32_cpu_offload=True)
    maps = {"": "cpu", "model.layers.1": "disk"}
    with pytest.raises(WriteError) as caught:
        pyint8.load(copy_of("llama"), maps, config=config, offload_folder="/proc/none/folder")
    assert caught.value.errno == errno.ENOENT


def test_transformers_own_writing_fails(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """transformers saves again what is in a pickle: an error of the offload folder, not a file that changed."""
    folder = copy_of("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ran = on_a_small_disk(tmp_path, f'FOLDER = "{folder}"; {PRETRAINED}', size="16k")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith(f"{errno.ENOSPC}|"), ran.stdout
    assert "choose another offload_folder" in ran.stdout
