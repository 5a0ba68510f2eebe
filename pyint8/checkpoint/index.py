"""A checkpoint: one file, or shards that agree with their index."""

from __future__ import annotations

import json
import logging
import os
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from pyint8.errors import CheckpointError, CheckpointNotFoundError, OptionError

from ._reading import JsonError, brief, os_errors, parse_json
from .entry import Entry
from .foreign import advice_for_file, advice_for_folder
from .pickled import EXTENSIONS, PickledFile, read_pickled
from .safetensors import SafetensorsFile, read_header
from .stamp import FileStamp, changed, has_changed

logger = logging.getLogger("pyint8")

CheckpointFile = SafetensorsFile | PickledFile

# The single file and the index that transformers looks for, in each format.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Checkpoint(Mapping[str, Entry]):
    """Every tensor of one or more files, by name, in order of file and offset.

    Args:
        files: What each of them holds.
        strict: Refuse a tensor that two of them hold; else the later one's is taken, as transformers does.

    Attributes:
        entries: The tensors by name.
        files: The paths of the files, in order.
        stamps: By path, the state that each of them had when its header was read.
        metadata: The `__metadata__` of the files together; of two values for a key, the earlier file's.
        nbytes: The bytes of all tensors together.

    Raises:
        CheckpointError: Two files hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[CheckpointFile], *, strict: bool = True) -> None:
        entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._nonempty: dict[str, list[Entry]] = {}
        for file in files:
            for name in [name for name in file.entries if name in entries]:
                problem = f"the tensor is in {entries[name].path} too; remove one of the two"
                _refuse(CheckpointError(problem, path=file.path, tensor=name, offset=file.entries[name].offset), strict)
                del entries[name]
            entries |= file.entries
            self.metadata = {**file.metadata, **self.metadata}
            self._nonempty[file.path] = [entry for entry in file.entries.values() if entry.nbytes]
        self.entries: Mapping[str, Entry] = MappingProxyType(entries)
        self.stamps: Mapping[str, FileStamp] = MappingProxyType({file.path: file.stamp for file in files})
        self.files = tuple(self.stamps)
        self.nbytes = sum(entry.nbytes for entry in entries.values())

    @property
    def most_bytes_loaded(self) -> int:
        """What a model made of it takes at most: 16 bit loaded as 32."""
        return 2 * self.nbytes

    @property
    def has_changed(self) -> bool:
        """Whether any of the paths is not that of the file any more whose header was read, in the state it had."""
        return any(has_changed(path, stamp) for path, stamp in self.stamps.items())

    def require_unchanged(self, paths: Iterable[str]) -> None:
        """Raises FileChangedError if one of these of `files` was replaced, removed or written to since."""
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
    strict: bool = True,
) -> Checkpoint:
    """Find the checkpoint of a folder as transformers does, and read its headers.

    Args:
        path: A folder with `model.safetensors` or, failing that, `model.safetensors.index.json` and the shards it
            names or, failing that, `pytorch_model.bin` or its index; or one file of these formats, or an index.
        subfolder: Where in the folder to look.
        variant: "fp16" makes that `model.fp16.safetensors` and `model.safetensors.index.fp16.json`.
        use_safetensors: True looks for safetensors alone, False for the other format alone.
        strict: Refuse shards that do not agree with their index, or of which two hold the same tensor; else warn, and
            take all that the shards hold, as transformers does.

    Raises:
        CheckpointNotFoundError: There is no such path, no checkpoint in the folder, only one of another format, or a
            shard is missing.
        CheckpointError: A header or the index breaks a rule, or they do not agree.
        ReadError: The operating system refused; `errno` says why.
        OptionError: `subfolder` or `variant` was given with a single file.
    """
    path = os.fspath(path)
    if _is_file(path):
        if subfolder or variant is not None:
            raise OptionError(f"subfolder and variant are for a folder, and {path} is a file; give the file alone")
        if path.endswith(".index.json"):
            return _open_sharded(os.path.dirname(path), path, strict)
        return Checkpoint([_read_file(path)])
    folder = os.path.join(path, subfolder) if subfolder else path
    formats = {None: (_SAFETENSORS, _PICKLED), True: (_SAFETENSORS,), False: (_PICKLED,)}[use_safetensors]
    looked_for = [_with_variant(name, variant) for names in formats for name in names]
    for single, index in zip(looked_for[::2], looked_for[1::2], strict=True):
        if _is_file(os.path.join(folder, single)):
            return Checkpoint([_read_file(os.path.join(folder, single))])
        if _is_file(os.path.join(folder, index)):
            return _open_sharded(folder, os.path.join(folder, index), strict)
    raise _nothing_in(folder, looked_for)


def checkpoint_of_files(files: Sequence[str], *, strict: bool = True) -> Checkpoint:
    """Read the headers of files that somebody else (transformers, the hub) has already resolved.

    Where a folder holds an index (`*.index.json`, or `*.index.<variant>.json`) that names exactly the given files of
    that folder, they are checked to agree with it.

    Args:
        files: The files, in the order the checkpoint shall have.
        strict: See `open_checkpoint`.

    Raises:
        CheckpointNotFoundError: A file is missing, or none was given.
        CheckpointError: A header or an index breaks a rule, or they do not agree.
        ReadError: The operating system refused; `errno` says why.
    """
    if not files:
        raise CheckpointNotFoundError("no checkpoint file was given; give at least one")
    checkpoint = Checkpoint([_read_file(file) for file in files], strict=strict)
    by_folder: dict[str, dict[str, str]] = {}
    for file in checkpoint.files:
        folder, name = os.path.split(file)
        by_folder.setdefault(folder, {})[name] = file
    for folder, paths in by_folder.items():
        for index, raw in _indexes_that_mention(folder, paths):
            weight_map = _weight_map(index, raw)
            if set(weight_map.values()) == paths.keys():
                _check_agreement(checkpoint, index, weight_map, paths, strict)
    return checkpoint


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
    if path.endswith(EXTENSIONS):
        return read_pickled(path)
    advice = advice_for_file(os.path.basename(path))
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
    with os_errors(path), open(path, "rb") as file:
        return file.read()


def _open_sharded(folder: str, index: str, strict: bool) -> Checkpoint:
    weight_map = _weight_map(index, _read_bytes(index))
    paths = {shard: os.path.join(folder, shard) for shard in sorted(set(weight_map.values()))}
    checkpoint = Checkpoint([_read_shard(path, index, weight_map) for path in paths.values()], strict=strict)
    _check_agreement(checkpoint, index, weight_map, paths, strict)
    return checkpoint


def _read_shard(path: str, index: str, weight_map: dict[str, str]) -> CheckpointFile:
    try:
        return _read_file(path)
    except CheckpointNotFoundError as error:
        expected = [name for name, shard in weight_map.items() if shard == os.path.basename(path)]
        raise CheckpointNotFoundError(
            f"this shard is missing; {index} says that it holds {_first(expected)}; download it", path=path
        ) from error


def _weight_map(path: str, raw: bytes) -> dict[str, str]:
    try:
        index = parse_json(raw)
    except JsonError as error:
        raise CheckpointError(f"the index: {error}; download it again", path=path, offset=error.position) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index is not a JSON object with a non-empty object `weight_map`; download it again", path=path
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(c in shard for c in "/\\\0"):
            raise CheckpointError(
                f"the index puts the tensor in {brief(shard)}, which is not the plain name of a file beside the "
                "index; do not trust this checkpoint, or correct the index",
                path=path,
                tensor=name,
            )
    return weight_map


def _check_agreement(
    checkpoint: Checkpoint, index: str, weight_map: dict[str, str], paths: Mapping[str, str], strict: bool
) -> None:
    for error in _disagreements(checkpoint, index, weight_map, paths):
        _refuse(error, strict)
        return  # one is enough to say


def _disagreements(
    checkpoint: Checkpoint, index: str, weight_map: dict[str, str], paths: Mapping[str, str]
) -> Iterator[CheckpointError]:
    advice = "the index and its shards are not of one checkpoint: download them again"
    for name, shard in weight_map.items():
        entry = checkpoint.entries.get(name)
        if entry is None or entry.path != paths[shard]:
            where = "no shard has it" if entry is None else f"it is in {entry.path}"
            yield CheckpointError(
                f"{index} says that the file holds this tensor, but {where}; {advice}", path=paths[shard], tensor=name
            )
    shards = set(paths.values())
    for name, entry in checkpoint.entries.items():
        if entry.path in shards and name not in weight_map:
            yield CheckpointError(
                f"{index} does not name this tensor, but the file holds it; {advice}",
                path=entry.path,
                tensor=name,
                offset=entry.offset,
            )


def _refuse(error: CheckpointError, strict: bool) -> None:
    if strict:
        raise error
    logger.warning("%s (loaded all the same, as transformers does)", error)


def _nothing_in(folder: str, looked_for: Sequence[str]) -> CheckpointNotFoundError:
    with os_errors(folder):
        names = sorted(os.listdir(folder))
    problem = f"the folder holds none of {', '.join(looked_for)}"
    advice = advice_for_folder(names)
    unusable = [name for name in looked_for if name in names]
    others = [name for name in names if ".safetensors" in name or name.startswith("pytorch_model")]
    if unusable:
        problem = f"{unusable[0]} is no file, or a link to one that is gone; download it again"
    elif others:
        problem += f", but {_first(others)}; give the path of the file itself, or the variant in its name"
    elif advice is not None:
        problem += f": {advice}"
    else:
        problem += "; check the path, or save a model there with save_pretrained"
    return CheckpointNotFoundError(problem, path=folder)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
