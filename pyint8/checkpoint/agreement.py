"""An index of shards: which copy of a tensor counts, and about which tensors the index and its shards do not agree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pyint8.errors import CheckpointError

from ._reading import JsonError, abbreviated, parse_json
from .entry import Entry

_ADVICE = "the index and its shards are not of one checkpoint: download them again"


class Holder(Protocol):
    """A file that holds tensors."""

    @property
    def path(self) -> str: ...
    @property
    def entries(self) -> dict[str, Entry]: ...


@dataclass(frozen=True)
class Index:
    """What an index says.

    Attributes:
        path: The index.
        files: For each tensor, the path of the file that it is said to be in.
        metadata: What it says beside that.
    """

    path: str
    files: Mapping[str, str]
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Disagreement:
    """A tensor that is not where an index says, or not there alone.

    Attributes:
        name: The tensor's.
        path: The file that is not as the index says.
        offset: Where the tensor lies in it, if it does.
        problem: What is wrong.
        is_settled: Whether there are several copies, and the index says which counts.
    """

    name: str
    path: str
    offset: int | None
    problem: str
    is_settled: bool = False

    def error(self, way_out: str = "") -> CheckpointError:
        """The error, with advice; `way_out` is a further way out of it."""
        problem = f"{self.problem}; {_ADVICE}{way_out}"
        return CheckpointError(problem, path=self.path, tensor=self.name, offset=self.offset)

    def __str__(self) -> str:
        return f"tensor {self.name!r}, {self.path}: {self.problem}"


def names_a_file(name: str) -> bool:
    """Whether it is the name of a file in its folder, and of nothing outside of it."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def weight_map_of(path: str, raw: bytes) -> dict[str, str]:
    """The file names by tensor that an index holds; raises as `content_of`."""
    return content_of(path, raw)[0]


def content_of(path: str, raw: bytes) -> tuple[dict[str, str], dict[str, object]]:
    """The file names by tensor that an index holds, and its metadata.

    Raises:
        CheckpointError: It is damaged, or leaves its folder.
    """
    try:
        index = parse_json(raw)
    except JsonError as error:
        raise CheckpointError(f"the index: {error}; download it again", path=path, offset=error.position) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index is not a JSON object with a non-empty object `weight_map`; download it again", path=path
        )
    holds_safetensors = ".safetensors.index." in os.path.basename(path)
    metadata = index.get("metadata", {}) if isinstance(index, dict) else {}
    if not isinstance(metadata, dict):
        raise CheckpointError("the `metadata` of the index is no JSON object; download it again", path=path)
    checked: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in checked:  # most are: there are few shards
            continue
        if not isinstance(shard, str) or not names_a_file(shard):
            raise CheckpointError(
                f"the index puts the tensor in {abbreviated(shard)}, which is not the plain name of a file beside the "
                "index; do not trust this checkpoint, or correct the index",
                path=path,
                tensor=name,
            )
        if holds_safetensors and not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"the index is of safetensors files and puts the tensor in {abbreviated(shard)}; do not trust this "
                "checkpoint, or correct the index",
                path=path,
                tensor=name,
            )
        checked.add(shard)
    return weight_map, metadata


def choose(files: Sequence[Holder], indexes: Sequence[Index]) -> tuple[dict[str, Entry], list[Disagreement]]:
    """The tensors of files together: of several copies the one that an index names, or else the last.

    Returns:
        The tensors by name, in order of file and offset; and the disagreements with the indexes, one for a tensor,
        tensors that no index names included.
    """
    chosen: dict[str, Entry] = {}
    copies: dict[str, list[Entry]] = {}
    for file in files:
        for name in chosen.keys() & file.entries.keys():
            copies.setdefault(name, [chosen[name]]).append(file.entries[name])
        chosen |= file.entries
    for index in indexes:
        for name, entries in copies.items():
            chosen[name] = next((entry for entry in entries if entry.path == index.files.get(name)), chosen[name])
    if copies:  # restore the order
        chosen = {name: entry for file in files for name, entry in file.entries.items() if chosen[name] is entry}
    found: dict[str, Disagreement] = {}
    for index in indexes:
        for disagreement in _disagreements(index, chosen, copies):
            found.setdefault(disagreement.name, disagreement)
    for name, entries in copies.items():
        last, problem = entries[-1], f"the tensor is in {entries[0].path} too, and no index says which counts"
        found.setdefault(name, Disagreement(name, last.path, last.offset, problem))
    return chosen, list(found.values())


def _disagreements(
    index: Index, chosen: Mapping[str, Entry], copies: Mapping[str, list[Entry]]
) -> Iterator[Disagreement]:
    for name, path in index.files.items():
        entry = chosen.get(name)
        if entry is None or entry.path != path:
            where = "no shard has it" if entry is None else f"it is in {entry.path}"
            yield Disagreement(name, path, None, f"{index.path} says that the file holds this tensor, but {where}")
    shards = set(index.files.values())
    for name, entry in chosen.items():
        if entry.path in shards and name not in index.files:
            problem = f"{index.path} does not name this tensor, but the file holds it"
            yield Disagreement(name, entry.path, entry.offset, problem)
    for name in copies.keys() & index.files.keys():
        other = next(entry for entry in copies[name] if entry is not chosen[name])
        problem = f"the tensor is in {chosen[name].path} too, where {index.path} says that it is"
        yield Disagreement(name, other.path, other.offset, problem, is_settled=True)
