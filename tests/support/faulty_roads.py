"""What is done while the system fails: every verb that reads or writes files, on checkpoints that load in milliseconds.

A road gives something to compare, which must be the same whatever was retried or gone round.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from zoo import ZOO, checkpoint_store

import pyint8
from pyint8.operations.cached import wait_for_fills

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Road:
    """Something to do, and the folder that it writes; None if it only reads."""

    act: Callable[[], Any]
    target: Path | None = None


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))


def plain(path: Path, **options: Any) -> Tensors:
    config = pyint8.Int8Config(skip_modules=[])
    return dict(pyint8.load(path, "cpu", model=module(), config=config, **options).state_dict())


def offloaded(path: Path, folder: Path) -> Tensors:
    """A module of which a part goes to the disk."""
    config = pyint8.Int8Config(skip_modules=[], fp32_cpu_offload=True)
    places = {"0": "cpu", "1": "disk"}
    model = pyint8.load(path, places, model=module(), config=config, offload_folder=folder)
    return {name: value for name, value in model.state_dict().items() if value.device.type != "meta"}


def from_cache(path: Path, cache: Path) -> Tensors:
    """Of the int8 form, which is made anew behind the load where a fault has made it look unsound."""
    values = dict(pyint8.load(path, "cpu", cache=cache).state_dict())
    assert wait_for_fills(60)
    return values


def reading(folder: Path) -> dict[str, Road]:
    values = module().state_dict()
    (folder / "checkpoints").mkdir(parents=True)
    safetensors, archive, old = (folder / "checkpoints" / name for name in ("w.safetensors", "w.bin", "old.bin"))
    save_file(values, safetensors)
    torch.save(values, archive)
    torch.save(values, old, _use_new_zipfile_serialization=False)
    store = checkpoint_store(folder / "zoo")
    llama, sharded = (store.folder(ZOO[name], "bf16") for name in ("llama", "llama_sharded"))
    int8, model = folder / "int8", pyint8.load(llama, "cpu")
    pyint8.save(model, int8)
    cache = folder / "cache"
    from_cache(llama, cache)
    direct = pyint8.StreamOptions(direct_io=True)
    return {
        "module": Road(lambda: plain(safetensors)),
        "direct": Road(lambda: plain(safetensors, options=direct)),
        "bin": Road(lambda: plain(archive)),
        "old bin": Road(lambda: plain(old)),
        "llama": Road(lambda: dict(pyint8.load(llama, "cpu").state_dict())),
        "sharded": Road(lambda: dict(pyint8.load(sharded, "cpu", options=direct).state_dict())),
        "int8": Road(lambda: dict(pyint8.load(int8, "cpu").state_dict())),
        "cache": Road(lambda: from_cache(llama, cache)),
        "reload": Road(lambda: (pyint8.reload(model, llama), dict(model.state_dict()))[1]),
        "verify": Road(lambda: pyint8.verify(int8).is_sound),
        "inspect": Road(lambda: [str(each) for each in pyint8.inspect(llama).tensors]),
    }


def writing(folder: Path) -> dict[str, Road]:
    store = checkpoint_store(folder / "zoo")
    llama = store.folder(ZOO["llama"], "bf16")
    model = pyint8.load(llama, "cpu")
    weights = folder / "w.safetensors"
    save_file(module().state_dict(), weights)
    places = {name: folder / "out" / name for name in ("save", "save over", "convert", "convert over", "shards")}
    (folder / "out").mkdir()
    for name in ("save over", "convert over"):
        pyint8.save(model, places[name])
        (places[name] / "mine.txt").write_text("mine")
        (places[name] / "model-00002-of-00002.safetensors").write_text("of an earlier save, so replaced")
    convert = pyint8.convert
    return {
        "save": Road(lambda: pyint8.save(model, places["save"]), places["save"]),
        "save over": Road(lambda: pyint8.save(model, places["save over"]), places["save over"]),
        "convert": Road(lambda: convert(llama, places["convert"], device="cpu") and None, places["convert"]),
        "convert over": Road(
            lambda: convert(llama, places["convert over"], device="cpu") and None, places["convert over"]
        ),
        "shards": Road(
            lambda: convert(llama, places["shards"], device="cpu", max_shard_size="40KB") and None, places["shards"]
        ),
        "offload": Road(lambda: offloaded(weights, folder / "out" / "offload"), folder / "out" / "offload"),
    }


ROADS = {"reading": reading, "writing": writing}


def copied(folder: Path, to: Path) -> None:
    """Makes `to` what `folder` is: a folder with the same files, or nothing."""
    if to.exists():
        shutil.rmtree(to)
    if folder.exists():
        shutil.copytree(folder, to)
