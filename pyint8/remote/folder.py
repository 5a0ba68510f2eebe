"""The folder that stands for a remote checkpoint while it is read."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any
from weakref import WeakSet

from pyint8.checkpoint.agreement import weight_map_of
from pyint8.checkpoint.checksums import CHECKSUMS
from pyint8.checkpoint.safetensors import MAX_HEADER_BYTES
from pyint8.checkpoint.side_files import is_weights
from pyint8.errors import CheckpointError, CheckpointNotFoundError, OptionError, Pyint8Error, RemoteError
from pyint8.host import ending
from pyint8.host.files import open_file
from pyint8.host.removal import discard_folder, remove_folder
from pyint8.host.writing import write_errors

from . import objects
from .store import Described, RemoteObject, Store
from .urls import RemotePath, is_plain_name, parsed

# What is fetched whole: configuration, index, tokenizer, code.
_LARGEST_BYTES = 64 << 20
_MOST_BYTES = 512 << 20
_MOST_FILES = 10_000
# Of a shard; most headers are shorter.
_FIRST_BYTES = 256 << 10
_AT_ONCE = 16

# What is asked for by name where the server does not list.
_KNOWN = (
    *("config.json", "generation_config.json", "README.md", "LICENSE", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", CHECKSUMS),
)
# And if there are no weights.
_OTHERS = ("adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_Run = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]


@contextmanager
def opened(
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    subfolder: str = "",
    variant: str | None = None,
) -> Iterator[str]:
    """The path that stands for a remote checkpoint while the block lasts: of a folder, or of one file.

    Args:
        url: Of the folder, or of one file of safetensors or an index.
        storage_options: For obstore's store: keys of the cloud, `client_options`, `credential_provider` and so on.
        subfolder: Where in it the checkpoint is.
        variant: As from_pretrained has it: "fp16" makes that model.fp16.safetensors.

    Raises:
        OptionError: The URL or the options cannot be used.
        CheckpointNotFoundError: Nothing is there.
        CheckpointError: What is there goes beyond the limits.
        RemoteError: The server refuses or fails.
        MissingDependencyError: obstore is not installed.
    """
    where = parsed(url)
    inside = [part for part in subfolder.split("/") if part]
    if any(part in (".", "..") for part in inside):
        raise OptionError(f"subfolder is {subfolder!r}; it must lie inside of {url}")
    at = RemotePath("/".join([where.folder, *inside]), where.name)
    stub = _Stub()
    with ending.awaited(stub):
        try:
            with stub.failures(where):
                root = stub.make(where.title)
                stub.store = store = Store(at.folder, storage_options, stub.stop)
                stub.stand_for(where.folder, _fill(os.path.join(root, *inside), store, at, variant, stub.stop))
                yield root if where.name is None else os.path.join(root, where.name)
        finally:
            stub.remove()


class _Stub:
    """The folder itself, of the process that made it."""

    def __init__(self) -> None:
        self.stop = Event()
        self.store: Store | None = None
        self._process = os.getpid()
        self._parent = ""
        self._root = ""
        _stubs.add(self)

    def make(self, title: str) -> str:
        """Its path, which ends in `title`."""
        with write_errors("the folder for temporary files (TMPDIR)"):
            self._parent = os.path.realpath(tempfile.mkdtemp(prefix="pyint8-"))
            self._root = os.path.join(self._parent, title)
            os.mkdir(self._root)
        return self._root

    @contextmanager
    def failures(self, where: RemotePath) -> Iterator[None]:
        """Errors within are of the URL, not of what stands for it."""
        try:
            yield
        except Pyint8Error as error:
            if self._root:
                error.problem = error.problem.replace(self._root, where.folder)
                error.path = None if error.path is None else error.path.replace(self._root, where.folder)
            raise

    def stand_for(self, url: str, found: dict[str, RemoteObject]) -> None:
        objects.begin(self._root, url, found)

    def remove(self) -> None:
        """Idempotent. A forked child has no part in it."""
        self.stop.set()
        if self.store is not None:
            self.store.close()
        if os.getpid() != self._process or not self._parent:
            return
        objects.end(self._root)
        try:
            remove_folder(self._parent)
        finally:  # again: Ctrl-C may have come in between
            discard_folder(self._parent)


_stubs: WeakSet[_Stub] = WeakSet()


def _remove_all() -> None:
    for stub in list(_stubs):
        stub.remove()


ending.stop_at_end(_remove_all)


def _fill(folder: str, store: Store, at: RemotePath, variant: str | None, stop: Event) -> dict[str, RemoteObject]:
    """Puts into a folder what stands for a remote one; the objects that its files stand for, by their paths."""
    with write_errors(folder):
        os.makedirs(folder, exist_ok=True)
    with _pool(stop) as run:
        listed = _listed(store, at, run) if store.can_list else None
        small = _described(store, _small(at, [*_KNOWN, *_usual(variant)] if listed is None else listed), run)
        _check_sizes(small, at.folder)
        run(lambda each: _write(folder, each.name, store.read(each, 0, each.size)), small)
        names = [name for name in _shards(folder, at, variant) if listed is None or name in listed]
        shards = _described(store, names, run)
        if not shards:
            _explain_absence(store, at, [each.name for each in small] if listed is None else listed, run)
        return dict(run(lambda shard: _make_stub(folder, store, shard), shards))


@contextmanager
def _pool(stop: Event) -> Iterator[_Run]:
    """Does something with each of many, several at once; Ctrl-C is not kept waiting by the network."""
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pyint8 remote")

    def run(work: Callable[[Any], Any], each: Iterable[Any]) -> list[Any]:
        return [future.result() for future in [pool.submit(work, one) for one in each]]

    try:
        yield run
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _listed(store: Store, at: RemotePath, run: _Run) -> list[str]:
    """The names of what is in the folder, but for what is hidden."""
    (found,) = run(lambda _: list(store.names()), [None])
    names = [name for name in found if is_plain_name(name) and not name.startswith(".")]
    if not names:
        raise CheckpointNotFoundError("nothing lies there; check bucket and folder", path=at.folder)
    if len(names) > _MOST_FILES:
        raise CheckpointError(f"{len(names)} files lie there, more than {_MOST_FILES}", path=at.folder)
    return names


def _described(store: Store, names: Iterable[str], run: _Run) -> list[Described]:
    """Those that are there. Some servers refuse (403) what is not; if they refuse all that there must be some of, that
    is said."""

    def described(name: str) -> Described | RemoteError | None:
        try:
            return store.described(name)
        except RemoteError as error:
            if error.errno != errno.EACCES:
                raise
            return error

    names = list(names)
    found = dict(zip(names, run(described, names), strict=True))
    there = [each for each in found.values() if isinstance(each, Described)]
    refused = next((each for name, each in found.items() if isinstance(each, RemoteError) and name != CHECKSUMS), None)
    if refused is not None and not there:
        raise refused
    return there


def _small(at: RemotePath, names: Iterable[str]) -> list[str]:
    """What is fetched whole: of a folder all but weights, of one file its checksums, and the file if it is an index."""
    if at.name is not None:
        beside = [name for name in names if name == CHECKSUMS]
        return [at.name, *beside] if at.name.endswith(".json") else beside
    is_index = [name for name in names if name.endswith(".safetensors.index.json")]
    return [*is_index, *(name for name in names if not is_weights(name))]


def _usual(variant: str | None) -> list[str]:
    single, index = "model.safetensors", "model.safetensors.index.json"
    if variant is None:
        return [single, index]
    return [f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"]


def _check_sizes(small: list[Described], url: str) -> None:
    for each in small:
        if each.size > _LARGEST_BYTES:
            problem = f"it has {each.size} bytes, more than the {_LARGEST_BYTES} that are fetched of such a file"
            raise CheckpointError(f"{problem}; take it out of the folder, or download it", path=f"{url}/{each.name}")
    total = sum(each.size for each in small)
    if total > _MOST_BYTES:
        raise CheckpointError(
            f"the files beside the weights have {total} bytes, more than {_MOST_BYTES}; give the folder of one model",
            path=url,
        )


def _shards(folder: str, at: RemotePath, variant: str | None) -> list[str]:
    """The files of safetensors that the checkpoint can be made of, by name."""
    if at.name is not None and at.name.endswith(".safetensors"):
        return [at.name]
    indexes = sorted(name for name in os.listdir(folder) if ".safetensors.index." in name and name.endswith(".json"))
    named = {name for index in indexes for name in _weight_map(os.path.join(folder, index)).values()}
    usual = [] if at.name is not None else [_usual(variant)[0], *_named_in_config(folder)]
    return sorted({name for name in [*named, *usual] if is_plain_name(name)})


def _weight_map(index: str) -> dict[str, str]:
    with open_file(index) as file:
        return weight_map_of(index, file.read())


def _named_in_config(folder: str) -> list[str]:
    """The file that the configuration's `transformers_weights` puts in place of the usual one."""
    try:
        with open_file(os.path.join(folder, "config.json")) as file:
            name = json.load(file)["transformers_weights"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):  # the load itself reports it
        return []
    return [name] if isinstance(name, str) and name.endswith(".safetensors") else []


def _explain_absence(store: Store, at: RemotePath, names: Collection[str], run: _Run) -> None:
    """Raises if what is there instead of safetensors cannot be read by ranges."""
    if not store.can_list:
        names = [*names, *(each.name for each in _described(store, _OTHERS, run))]
    if "adapter_config.json" in names and "config.json" not in names:
        raise OptionError(f"{at.folder} holds a PEFT adapter, which PEFT reads from files; download it")
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")))
    if pickled:
        raise CheckpointNotFoundError(
            f"there is no safetensors file, and {pickled[0]}, of PyTorch's format, cannot be read from there; download "
            "the folder, or save it with safetensors",
            path=at.folder,
        )
    if not set(names) - {CHECKSUMS}:
        raise CheckpointNotFoundError("nothing lies there that a checkpoint has; check the URL", path=at.folder)


def _make_stub(folder: str, store: Store, shard: Described) -> tuple[str, RemoteObject]:
    """A file as long as the object, that has its header; and the object."""
    head = store.read(shard, 0, min(_FIRST_BYTES, shard.size))
    end = 8 + min(int.from_bytes(head[:8], "little"), MAX_HEADER_BYTES)
    if end > len(head):
        head += store.read(shard, len(head), min(end, shard.size) - len(head))
    path = _write(folder, shard.name, head[:end])
    with write_errors(path):
        _extend(path, shard.size)
    return path, RemoteObject(store, shard, path)


def _extend(path: str, size: int) -> None:
    """What is added is a hole, which takes no room."""
    os.truncate(path, size)


def _write(folder: str, name: str, raw: bytes) -> str:
    path = os.path.join(folder, name)
    with write_errors(path), open(path, "xb") as file:
        file.write(raw)
    return path
