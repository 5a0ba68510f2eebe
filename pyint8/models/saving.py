"""From a state dict to the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from pyint8.checkpoint.entry import CODES
from pyint8.checkpoint.shards import Shards, shards_of
from pyint8.checkpoint.shards_writer import ShardsWriter
from pyint8.checkpoint.writer import TensorPlan
from pyint8.errors import CheckpointError, ModelNotSupportedError
from pyint8.models.live import weights_maps
from pyint8.quantizer import require_codes
from pyint8.streaming.checksums import Checksums
from pyint8.streaming.write_behind import WriteBehind

WRITERS = 4
"""How many tensors are written at once."""
MOST_BYTES = 512 << 20
"""Of tensors that wait to be written."""


def save_module(module: nn.Module, folder: str, max_shard_size: int | str, *, checksums: bool) -> None:
    """Writes a plain module's state dict to an empty folder; tied parameters once.

    Raises:
        ModelNotSupportedError: It is not int8, or its state dict has more than tensors.
        WriteError: The operating system refused.
    """
    require_codes(module)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise ModelNotSupportedError(f"{name} in its state dict is a {type(value).__name__}, not a tensor")
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value.detach()
    shards = shards_of((planned(name, tensor) for name, tensor in tensors.items()), max_shard_size)
    write_shards(folder, shards, lambda name: in_memory(module, name, tensors[name]), {}, checksums=checksums)


def planned(name: str, tensor: torch.Tensor) -> TensorPlan:
    """What is to be written of a tensor, which may be on meta.

    Raises:
        CheckpointError: The format has no such tensors.
    """
    code = CODES.get(str(tensor.dtype).removeprefix("torch."))
    if tensor.layout is not torch.strided or code is None:
        raise CheckpointError(f"safetensors has no {tensor.layout} tensors of {tensor.dtype}", tensor=name)
    return TensorPlan(name, code, tuple(tensor.shape))


def write_shards(
    folder: str,
    shards: Shards,
    tensor: Callable[[str], torch.Tensor],
    metadata: Mapping[str, object],
    *,
    checksums: bool,
) -> None:
    """Writes all files of a checkpoint.

    Args:
        folder: Where to.
        shards: What they hold.
        tensor: The value of a tensor, by its name.
        metadata: Of the index, where there is one.
        checksums: Whether to write those of all tensors.

    Raises:
        WriteError: The operating system refused.
    """
    with ShardsWriter(folder, shards) as writer, WriteBehind(WRITERS, MOST_BYTES) as behind:
        sums = Checksums() if checksums else None
        for name in shards.file_of:
            behind.put(tensor(name), partial(write_tensor, writer, sums, name))
        behind.finish()
        writer.finish()
        writer.write_index(metadata)
        if sums is not None:
            writer.write_checksums(sums.of)


def write_tensor(writer: ShardsWriter, checksums: Checksums | None, name: str, pieces: Iterator[memoryview]) -> None:
    """Writes the pieces of a tensor's bytes, and takes its checksum, if they are wanted.

    Raises:
        WriteError: The operating system refused.
    """
    writer.write(name, pieces if checksums is None else checksums.noting(name, pieces))


def in_memory(model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor of the model's state dict; accelerate fetches those that it keeps elsewhere (in host memory, in files).

    Raises:
        CheckpointError: It has no values.
    """
    if not value.is_meta:
        return value
    owner_name, _, leaf = name.rpartition(".")
    for values in weights_maps(model.get_submodule(owner_name)):
        if leaf in values:
            value = values[leaf]
    if value.is_meta:
        raise CheckpointError("it has no values (it is on meta); load the model first", tensor=name)
    return value
