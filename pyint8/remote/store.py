"""A folder of an object store or a web server, through obstore: what is there, and ranges of it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

from pyint8.errors import (
    CancelledError,
    FileChangedError,
    MissingDependencyError,
    OptionError,
    Pyint8Error,
    RemoteError,
)

from .askers import Askers
from .failures import changed, failure, may_pass

# docs/performance.md, "Remote checkpoints", has the experiments behind these two.
_CHUNK_BYTES = 16 << 10
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0
# No byte for so long is a stall; the last is for a whole range, however slowly it comes.
_TIMEOUTS = {"connect_timeout": "5s", "read_timeout": "5s", "timeout": "120s"}
_OF_CONNECTIONS = ("allow_http", "allow_invalid_certificates", "proxy_url", *_TIMEOUTS)


@dataclass(frozen=True)
class Described:
    """One state of an object.

    Attributes:
        name: Of the object, in its folder.
        size: In bytes.
        tag: Its ETag; None where the server says none.
        modified: When it was written, as the server says.
    """

    name: str
    size: int
    tag: str | None
    modified: str

    @classmethod
    def of(cls, meta: Mapping[str, Any], name: str) -> Described:
        return cls(name, meta["size"], meta.get("e_tag"), str(meta.get("last_modified")))

    @property
    def condition(self) -> dict[str, str]:
        """What makes a server refuse to serve another state; nothing where it would refuse this one too."""
        return {} if self.tag is None or self.tag.startswith("W/") else {"if_match": self.tag}

    def is_of(self, other: Described) -> bool:
        """Whether both are the same state. Stores write one ETag with quotes here and without there."""
        if self.tag is None or other.tag is None:
            return (self.size, self.modified) == (other.size, other.modified)
        return (self.size, _bare(self.tag)) == (other.size, _bare(other.tag))


def _bare(tag: str) -> str:
    return tag.removeprefix("W/").strip('"')


class Store:
    """A folder.

    Args:
        url: Of the folder.
        options: For obstore's store.
        stop: Once it is set, everything raises CancelledError soon.

    Attributes:
        url: As given.
        askers: What waits for its answers.

    Raises:
        MissingDependencyError: obstore is not installed.
        OptionError: The options cannot be used.
        RemoteError: This process was forked from one that has used obstore.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None, stop: Event) -> None:
        self.url = url
        self._stop = stop
        self._obstore = _imported(url)
        self._store = _opened(self._obstore, url, options or {})
        self.askers = Askers()

    @property
    def can_list(self) -> bool:
        """Whether it says what is there: plain web servers do not."""
        return type(self._store).__name__ != "HTTPStore"

    def names(self) -> Iterator[str]:
        """Of what lies in the folder, without what lies in folders inside of it."""
        with self._failures(None):
            found = self._again(lambda: self._obstore.list_with_delimiter(self._store))
        for meta in found["objects"]:
            yield meta["path"].rpartition("/")[2]

    def described(self, name: str) -> Described | None:
        """The state of an object; None if there is none."""
        with self._failures(name):
            try:
                return Described.of(self._again(lambda: self._obstore.head(self._store, name)), name)
            except FileNotFoundError:
                return None

    def url_of(self, name: str | None) -> str:
        return self.url if name is None else f"{self.url}/{name}"

    def read(self, known: Described, offset: int, nbytes: int) -> bytes:
        """A range that is not large, of an object in this state."""
        ranges = self.ranges(known, offset, nbytes, self._stop)
        return self.askers.call(lambda: b"".join(bytes(chunk) for chunk in ranges), self._stop)

    def ranges(self, known: Described, offset: int, nbytes: int, stop: Event) -> Iterator[Any]:
        """A range of an object in this state, as buffers that follow one another.

        What does not come is asked for again, a few times.

        Raises:
            FileChangedError: The object is in another state.
            RemoteError: The server refuses, or fails again and again.
            CancelledError: `stop` was set.
        """
        end, failed = offset + nbytes, 0
        while offset < end:
            _refuse_if(stop)
            try:
                for chunk in self._asked(known, offset, end):
                    offset += len(chunk)
                    yield chunk
                    _refuse_if(stop)
                    if offset == end:
                        return
                raise ConnectionError("the answer ended too early")
            except Pyint8Error:
                raise
            except Exception as error:
                failed += 1
                if failed == _ATTEMPTS or not may_pass(error):
                    raise failure(error, self.url_of(known.name), offset) from error
                _pause(failed, stop)

    def close(self) -> None:
        """Closes connections that nothing uses, whoever still holds this, such as the traceback of an error."""
        self._store = None
        self.askers.close()

    def _asked(self, known: Described, offset: int, end: int) -> Iterator[Any]:
        for chunk in self._answer(known, offset, end):
            if len(chunk) > end - offset:
                raise RemoteError("the server sends more than it was asked for", path=self.url_of(known.name))
            offset += len(chunk)
            yield chunk

    def _answer(self, known: Described, offset: int, end: int) -> Any:
        options = {"range": (offset, end), **known.condition}
        answer = self._obstore.get(self._store, known.name, options=options)
        if not Described.of(answer.meta, known.name).is_of(known) or tuple(answer.range) != (offset, end):
            del answer  # and its connection, which the error's traceback would keep
            raise changed(self.url_of(known.name), offset)
        return answer.stream(min_chunk_size=_CHUNK_BYTES)

    def _again(self, ask: Any) -> Any:
        """What `ask` gives, once it does."""
        for failed in range(1, _ATTEMPTS):
            _refuse_if(self._stop)
            try:
                return self.askers.call(ask, self._stop)
            except Exception as error:
                if not may_pass(error):
                    raise
                _pause(failed, self._stop)
        return self.askers.call(ask, self._stop)

    @contextmanager
    def _failures(self, name: str | None) -> Iterator[None]:
        try:
            yield
        except Pyint8Error:
            raise
        except Exception as error:
            raise failure(error, self.url_of(name)) from error


class RemoteObject:
    """A shard, in the state that it had when its header was read.

    Args:
        store: Its folder.
        known: That state.
        path: Of the file that stands for it.

    Attributes:
        url: Its own.
        tag: What distinguishes this state of it from any other's, as text.
    """

    def __init__(self, store: Store, known: Described, path: str) -> None:
        self._store = store
        self._known = known
        self._path = path
        self.url = store.url_of(known.name)
        self.tag = f"{self.url} {known.size} {known.tag or known.modified}"

    def reader(self) -> RemoteReader:
        """What an engine reads through."""
        return RemoteReader(self._store, self._known, self._path)


class RemoteReader:
    """Ranges of an object, for one engine, which cancels them when it closes."""

    def __init__(self, store: Store, known: Described, path: str) -> None:
        self._store = store
        self._known = known
        self._path = path
        self._stop = Event()

    def ranges(self, offset: int, nbytes: int) -> Iterator[Any]:
        """See `Store.ranges`. Errors are of the file here, by which the stream finds their tensor."""
        try:
            yield from self._store.ranges(self._known, offset, nbytes, self._stop)
        except (FileChangedError, RemoteError) as error:
            error.path = self._path
            raise

    def run(self, task: Callable[[], object]) -> None:
        """Has another thread read: an engine's worker need not wait for it once it is cancelled."""
        self._store.askers.run(task)

    def cancel(self) -> None:
        """Ranges under way raise CancelledError with their next bytes, or when they have waited too long for them."""
        self._stop.set()


def _pause(failed: int, stop: Event) -> None:
    longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (failed - 1))
    stop.wait(random.uniform(0.5, 1.0) * longest)  # readers that failed together should not ask again together


def _refuse_if(stop: Event) -> None:
    if stop.is_set():
        raise CancelledError("the stream was closed")


_used_by: list[int] = []


def _imported(url: str) -> Any:
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise MissingDependencyError(f"{url} is read with obstore: `pip install pyint8[remote]` ({error})") from error
    if os.getpid() not in _used_by:
        if _used_by:
            raise RemoteError("the process that this one was forked from has read from there; spawn it", path=url)
        _used_by.append(os.getpid())
    return obstore


def _opened(obstore: Any, url: str, options: Mapping[str, Any]) -> Any:
    clients = {**_TIMEOUTS, **_clients_of_environment(url), **(options.get("client_options") or {})}
    # `Store.ranges` asks again itself, for what has not come.
    given = {"retry_config": {"max_retries": 0}, **options, "client_options": clients}
    try:
        return obstore.store.from_url(url, **given)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of obstore's, for some keys
            raise
        reason = " ".join(str(error).partition("Debug source")[0].split())
        raise OptionError(f"{url} cannot be opened with these storage_options: {reason}") from error


def _clients_of_environment(url: str) -> dict[str, Any]:
    """What the environment says of connections, which obstore looks at only where it is given no timeouts either."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        return {"allow_http": scheme == "http"}
    prefix = {"s3": "AWS_", "s3a": "AWS_", "gs": "GOOGLE_"}.get(scheme, "AZURE_")
    named = {key: os.environ.get(prefix + key.upper()) for key in _OF_CONNECTIONS}
    return {key: value for key, value in named.items() if value is not None}
