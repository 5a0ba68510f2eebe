"""Which tensors go into which file of a checkpoint, by the rules and names of huggingface_hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyint8.errors import OptionError

from .writer import TensorPlan

INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint that is going to be written.

    Attributes:
        files: The tensors of each file, by its name.
        file_of: The file of each tensor.
        total_bytes: Of all tensors.
    """

    files: Mapping[str, list[TensorPlan]]
    file_of: Mapping[str, str]
    total_bytes: int

    def names_of_others(self, rank: int, ranks: int) -> frozenset[str]:
        """The tensors in other ranks' files, which are shared out whole and in order."""
        others: set[str] = set()
        before = 0
        for plans in self.files.values():
            nbytes = sum(plan.nbytes for plan in plans)
            owner = int((before + nbytes / 2) * ranks / max(1, self.total_bytes))
            before += nbytes
            if min(owner, ranks - 1) != rank:
                others.update(plan.name for plan in plans)
        return frozenset(others)

    def index(self, metadata: Mapping[str, object]) -> bytes | None:
        """The index as transformers writes it; None for a single file."""
        if len(self.files) == 1:
            return None
        described = {**metadata, "total_size": self.total_bytes}
        index = {"metadata": described, "weight_map": dict(self.file_of)}
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def shards_of(tensors: Iterable[TensorPlan], max_shard_size: int | str) -> Shards:
    """Shares tensors out in order.

    Args:
        tensors: All of the checkpoint.
        max_shard_size: Of one file, in bytes or as a size such as "5GB"; a larger tensor has a file of its own.

    Raises:
        OptionError: `max_shard_size` is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in tensors}
    try:
        found = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=_PATTERN,
            max_shard_size=_checked(max_shard_size),
        )
    except ValueError as error:
        raise _no_size(max_shard_size) from error
    files = {file: [by_name[name] for name in names] for file, names in found.filename_to_tensors.items() if names}
    return Shards(files, found.tensor_to_filename, sum(tensor.nbytes for tensor in by_name.values()))


def _checked(size: int | str) -> int | str:
    is_number = isinstance(size, int) and not isinstance(size, bool)
    if isinstance(size, str) or (is_number and size > 0):
        return size
    raise _no_size(size)


def _no_size(size: object) -> OptionError:
    return OptionError(f'max_shard_size is {size!r}; it must be a number of bytes above 0, or a size such as "5GB"')
