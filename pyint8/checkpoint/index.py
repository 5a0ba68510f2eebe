"""A checkpoint: one file, or shards that agree with their index."""

from __future__ import annotations

import json
import os
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from pyint8.errors import CheckpointNotFoundError, OptionError, Pyint8Error, first_names
from pyint8.host.files import open_file

from ._reading import os_errors
from .advice import advice_for_file, advice_for_folder
from .agreement import Index, choose, content_of
from .checksums import with_checksums
from .entry import SCALES, Entry
from .pickled import EXTENSIONS, PickledFile, is_pickled, read_pickled
from .safetensors import SafetensorsFile, read_header
from .stamp import FileStamp, changed, has_changed

CheckpointFile = SafetensorsFile | PickledFile

# The single file and the index that transformers looks for, in each format.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Checkpoint(Mapping[str, Entry]):
    """Every tensor of one or more files, by name, in order of file and offset.

    Args:
        files: What each of them holds. Of several copies of a tensor the one that an index names counts, or else the
            last.
        indexes: Those of the files, if there are any.

    Attributes:
        entries: The tensors by name.
        disagreements: Tensors that are not as an index says. Whether that matters depends on what a load needs.
        files: The paths of the files, in order.
        stamps: By path, the state that each of them had when its header was read.
        metadata: The `__metadata__` of the files together; for a key with two values, the earlier file's.
        index_metadata: The `metadata` of the indexes, likewise.
        nbytes: The bytes of all tensors together.
    """

    def __init__(self, files: Sequence[CheckpointFile], indexes: Sequence[Index] = ()) -> None:
        entries, self.disagreements = choose(files, indexes)
        self.entries: Mapping[str, Entry] = MappingProxyType(entries)
        self.stamps: Mapping[str, FileStamp] = MappingProxyType({file.path: file.stamp for file in files})
        self.files = tuple(self.stamps)
        self.metadata: dict[str, str] = {}
        for file in files:
            self.metadata = {**file.metadata, **self.metadata}
        self.index_metadata: dict[str, object] = {}
        for index in indexes:
            self.index_metadata = {**index.metadata, **self.index_metadata}
        self.nbytes = sum(entry.nbytes for entry in entries.values())
        self._nonempty = {file.path: [entry for entry in file.entries.values() if entry.nbytes] for file in files}

    @property
    def has_codes(self) -> bool:
        """Whether weights are int8 codes already, with bitsandbytes' scales beside them."""
        return any(name.endswith(f".{SCALES}") for name in self.entries)

    @property
    def absent(self) -> list[str]:
        """The tensors that an index names, and none of the files has."""
        return [disagreement.name for disagreement in self.disagreements if disagreement.name not in self.entries]

    @property
    def most_bytes_loaded(self) -> int:
        """The most memory that a model made of it can take: 16 bit loaded as 32."""
        return 2 * self.nbytes

    @property
    def has_changed(self) -> bool:
        """Whether any path no longer leads to the file whose header was read, in the state it had."""
        return any(has_changed(path, stamp) for path, stamp in self.stamps.items())

    def require_unchanged(self, paths: Iterable[str]) -> None:
        """Raises FileChangedError if one of these `files` was replaced, removed or written to since."""
        for path in paths:
            if has_changed(path, self.stamps[path]):
                raise changed(path)

    def tensor_at(self, path: str, offset: int) -> str | None:
        """Say which tensor holds a byte.

        Args:
            path: One of `files`, spelled as there.
            offset: The byte, from the start of the file.

        Returns:
            The tensor's name, or None for a byte of the header, beyond the end or of another file.
        """
        entries = self._nonempty.get(path, [])
        at = bisect_right(entries, offset, key=lambda entry: entry.offset)
        if at == 0 or offset >= entries[at - 1].offset + entries[at - 1].nbytes:
            return None
        return entries[at - 1].name

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    subfolder: str = "",
    variant: str | None = None,
    use_safetensors: bool | None = None,
    problems: list[Pyint8Error] | None = None,
) -> Checkpoint:
    """Find the checkpoint of a folder as transformers does, and read its headers.

    Args:
        path: A folder with `model.safetensors` or, failing that, `model.safetensors.index.json` and the shards it
            names or, failing that, `pytorch_model.bin` or its index; or one file of these formats, or an index.
        subfolder: Where in the folder to look.
        variant: "fp16" makes that `model.fp16.safetensors` and `model.safetensors.index.fp16.json`.
        use_safetensors: True looks for safetensors alone, False for the other format alone.
        problems: Takes the errors of shards, which are left out; without it the first is raised.

    Raises:
        CheckpointNotFoundError: There is no such path, no checkpoint in the folder, only one of another format, or a
            shard is missing.
        CheckpointError: A header or the index breaks a rule.
        ReadError: The operating system refused; `errno` says why.
        OptionError: `subfolder` or `variant` was given with a single file.
    """
    path = os.fspath(path)
    if _is_file(path):
        if subfolder or variant is not None:
            raise OptionError(f"subfolder and variant are for a folder, and {path} is a file; give the file alone")
        if path.endswith(".index.json"):
            return _open_sharded(os.path.dirname(path), path, problems)
        return Checkpoint(with_checksums([_read_file(path)]))
    folder = os.path.join(path, subfolder) if subfolder else path
    formats = {None: (_SAFETENSORS, _PICKLED), True: (_SAFETENSORS,), False: (_PICKLED,)}[use_safetensors]
    looked_for = [_with_variant(name, variant) for names in formats for name in names]
    for single, index in zip(looked_for[::2], looked_for[1::2], strict=True):
        if _is_file(os.path.join(folder, single)):
            return Checkpoint(with_checksums([_read_file(os.path.join(folder, single))]))
        if _is_file(os.path.join(folder, index)):
            return _open_sharded(folder, os.path.join(folder, index), problems)
    raise _nothing_in(folder, looked_for)


def checkpoint_of_files(files: Sequence[str]) -> Checkpoint:
    """Read the headers of files that transformers, or the hub, has already resolved.

    Where a folder holds an index (`*.index.json`, or `*.index.<variant>.json`) that names exactly the given files of
    that folder, it is theirs.

    Args:
        files: The files, in the order of the checkpoint.

    Raises:
        CheckpointNotFoundError: A file is missing, or none was given.
        CheckpointError: A header or an index breaks a rule.
        ReadError: The operating system refused; `errno` says why.
    """
    if not files:
        raise CheckpointNotFoundError("no checkpoint file was given; give at least one")
    read = with_checksums(_read_file(file) for file in files)
    by_folder: dict[str, dict[str, str]] = {}
    for file in files:
        folder, name = os.path.split(file)
        by_folder.setdefault(folder, {})[name] = file
    return Checkpoint(read, [index for folder, paths in by_folder.items() for index in _indexes_of(folder, paths)])


def _indexes_of(folder: str, paths: Mapping[str, str]) -> Iterator[Index]:
    """The indexes in a folder that name exactly its files `paths`, which are by name."""
    for path, raw in _indexes_that_mention(folder, paths):
        weight_map, metadata = content_of(path, raw)
        if set(weight_map.values()) == paths.keys():
            yield _index(path, weight_map, paths, metadata)


def _with_variant(name: str, variant: str | None) -> str:
    stem, extension = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{extension}"


def _is_file(path: str) -> bool:
    with os_errors(path):
        try:
            return stat.S_ISREG(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def _read_file(path: str) -> CheckpointFile:
    """In the format that the name says, or else the bytes."""
    if path.endswith(EXTENSIONS) or (not path.endswith(".safetensors") and is_pickled(path)):
        return read_pickled(path)
    with os_errors(path):
        advice = advice_for_file(path)
    if advice is not None:
        raise CheckpointNotFoundError(f"this is no safetensors file: {advice}", path=path)
    return read_header(path)


def _indexes_that_mention(folder: str, files: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    # Another model's index, even a broken one, is no reason to refuse these files.
    mentions = [json.dumps(file).encode() for file in files]
    with os_errors(folder):
        names = sorted(os.listdir(folder or "."))
    for name in names:
        if ".index." in name and name.endswith(".json"):
            path = os.path.join(folder, name)
            raw = _read_bytes(path)
            if any(mention in raw for mention in mentions):
                yield path, raw


def _read_bytes(path: str) -> bytes:
    with os_errors(path), open_file(path) as file:
        return file.read()


def _open_sharded(folder: str, index: str, problems: list[Pyint8Error] | None) -> Checkpoint:
    weight_map, metadata = content_of(index, _read_bytes(index))
    paths = {shard: os.path.join(folder, shard) for shard in sorted(set(weight_map.values()))}
    read = {shard: _read_if_sound(path, index, weight_map, problems) for shard, path in paths.items()}
    shards = [file for file in read.values() if file is not None]
    known = {name: shard for name, shard in weight_map.items() if read[shard] is not None}
    return Checkpoint(with_checksums(shards), [_index(index, known, paths, metadata)])


def _read_if_sound(
    path: str, index: str, weight_map: Mapping[str, str], problems: list[Pyint8Error] | None
) -> CheckpointFile | None:
    try:
        return _read_shard(path, index, weight_map)
    except Pyint8Error as error:
        if problems is None:
            raise
        problems.append(error)
        return None


def _index(path: str, weight_map: Mapping[str, str], paths: Mapping[str, str], metadata: Mapping[str, object]) -> Index:
    return Index(path, {name: paths[shard] for name, shard in weight_map.items()}, metadata)


def _read_shard(path: str, index: str, weight_map: Mapping[str, str]) -> CheckpointFile:
    try:
        return _read_file(path)
    except CheckpointNotFoundError as error:
        expected = [name for name, shard in weight_map.items() if shard == os.path.basename(path)]
        raise CheckpointNotFoundError(
            f"this shard is missing; {index} says that it holds {first_names(expected)}; download it", path=path
        ) from error


def _nothing_in(folder: str, looked_for: Sequence[str]) -> CheckpointNotFoundError:
    with os_errors(folder):
        names = sorted(os.listdir(folder))
    unusable = [name for name in looked_for if name in names]
    if unusable:
        problem = f"{unusable[0]} is no file, or a link to one that is gone; download it again"
    else:
        problem = f"the folder holds none of {', '.join(looked_for)}{advice_for_folder(names, looked_for)}"
    return CheckpointNotFoundError(problem, path=folder)
