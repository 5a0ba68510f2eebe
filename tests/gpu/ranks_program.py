"""What two or more ranks do on GPUs: `torchrun --nproc-per-node 2 tests/gpu/ranks_program.py FOLDER [FOLDER ...]`.

Each checkpoint is loaded together and alone, and must give the same; a failure of one rank must be told to all. Prints
a line of JSON on rank 0.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from checksums import add_checksums, damage
from oracle import assert_same
from torch.distributed.elastic.multiprocessing.errors import record

import pyint8
from pyint8.checkpoint import Entry
from pyint8.errors import ChecksumError
from pyint8.streaming.ranks import pieces

DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def load(folder: str, **kwargs: Any) -> tuple[Any, pyint8.LoadReport]:
    found: tuple[Any, pyint8.LoadReport] = pyint8.load(
        folder, **({"device_map": "cuda", "progress": False, "return_report": True} | kwargs)
    )
    return found


def own_peak(folder: str, **kwargs: Any) -> tuple[Any, pyint8.LoadReport, int]:
    """A model, its report, and the GPU memory that its load took at most."""
    before = torch.cuda.memory_allocated(DEVICE)
    torch.manual_seed(0)  # of weights that the checkpoint lacks
    model, report = load(folder, **kwargs)
    return model, report, report.device_peak_bytes[str(DEVICE)] - before


def compare(folder: str) -> dict[str, float]:
    """Together and alone: the same bytes of the model, a part of the bytes of the files, and no more memory."""
    alone, whole, peak_alone = own_peak(folder)
    ours, report, peak = own_peak(folder, process_group=dist.group.WORLD)
    assert_same(ours, alone)
    share = report.engine["bytes_delivered"] / whole.engine["bytes_delivered"]
    return {"share": share, "more_memory": peak - peak_alone}


def fail_once(folder: str) -> str:
    """What a load raises in which rank 1 fails in the middle."""
    from pyint8.quantizer import Int8Quantizer

    with ExitStack() as stack:
        if dist.get_rank() == 1:
            broken = RuntimeError("of rank 1")
            stack.enter_context(mock.patch.object(Int8Quantizer, "create_quantized_param", side_effect=broken))
        try:
            load(folder, process_group=dist.group.WORLD)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def fail(folder: str) -> dict[str, float]:
    """Twenty times; then all is well. The most seconds between the first and the last rank that raised."""
    expected = "RuntimeError: of rank 1"
    if dist.get_rank() != 1:
        expected = f"RankError: rank 1 of {dist.get_world_size()} failed: {expected}"
    slowest = 0.0
    for _ in range(20):
        found = fail_once(folder)
        at = torch.tensor([time.time()], dtype=torch.float64, device=DEVICE)
        moments = [torch.empty_like(at) for _ in range(dist.get_world_size())]
        dist.all_gather(moments, at)
        assert found == expected, found
        slowest = max(slowest, float(max(moments) - min(moments)))
    load(folder, process_group=dist.group.WORLD)
    return {"seconds_between_ranks": slowest}


def find_damage(folder: str) -> None:
    """A tensor with a checksum that it does not have is every rank's own error, whoever read it."""
    copied, damaged = Path(folder).with_suffix(".damaged"), list[Entry]()
    if dist.get_rank() == 0:
        shutil.copytree(folder, copied)
        damaged += [entry for name, entry in add_checksums(copied).items() if "up_proj" in name]
    dist.barrier()
    assert_same(load(str(copied), process_group=dist.group.WORLD)[0], load(str(copied))[0])
    dist.barrier()
    for entry in damaged:
        damage(entry, entry.nbytes - 2)
    dist.barrier()
    with pytest.raises(ChecksumError) as caught:
        load(str(copied), process_group=dist.group.WORLD)
    assert "up_proj" in str(caught.value.tensor)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(copied)


@record
def main(folders: list[str]) -> None:
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", device_id=DEVICE)
    with mock.patch.object(pieces, "_LEAST_BYTES", 256):  # of tiny models, too
        found: dict[str, Any] = {Path(folder).name: compare(folder) for folder in folders}
        found["failures"] = fail(folders[0])
        find_damage(folders[0])
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
