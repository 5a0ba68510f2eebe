"""Ranges of objects: every fault of a server passes, or is an error with URL and byte; wrong bytes never come."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from range_server import Fault, RangeServer

from pyint8.errors import CancelledError, FileChangedError, MissingDependencyError, OptionError, RemoteError

pytest.importorskip("obstore")

from pyint8.remote.failures import failure
from pyint8.remote.store import Described, Store

NAME = "model.safetensors"
START, NBYTES = 1000, 500_000


@pytest.fixture
def store(server: RangeServer, impatient: dict[str, Any]) -> Store:
    return Store(server.url, impatient, threading.Event())


@pytest.fixture
def known(store: Store) -> Described:
    found = store.described(NAME)
    assert found is not None
    return found


@pytest.fixture
def expected(folder: Path) -> bytes:
    return (folder / NAME).read_bytes()[START : START + NBYTES]


def test_what_is_there(store: Store, known: Described, folder: Path) -> None:
    assert known.size == (folder / NAME).stat().st_size
    assert store.described("nothing.json") is None
    assert not store.can_list


def test_a_range(store: Store, known: Described, expected: bytes, server: RangeServer) -> None:
    assert store.read(known, START, NBYTES) == expected
    assert store.read(known, START, 0) == b""
    assert server.asked() == NBYTES


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("kind", [408, 429, 500, 503, "cut", "reset", "stall", "trickle", "more", "shift"])
def test_a_fault_passes(server: RangeServer, store: Store, expected: bytes, kind: int | str, etags: bool) -> None:
    server.etags = etags
    known = store.described(NAME)
    assert known is not None
    server.faults = [Fault(kind, times=2)]
    assert store.read(known, START, NBYTES) == expected
    assert server.faults[0].times == 0


def test_only_what_did_not_come_is_asked_for_again(server: RangeServer, store: Store, known: Described) -> None:
    server.faults = [Fault("cut", times=1)]
    store.read(known, START, NBYTES)
    first, second = (request for request in server.requests if request.method == "GET")
    assert (first.start, first.nbytes) == (START, NBYTES)
    assert second.start + second.nbytes == START + NBYTES
    assert second.start > START


@pytest.mark.parametrize(
    ("kind", "kind_of_error", "number"),
    [
        (401, RemoteError, errno.EACCES),
        (403, RemoteError, errno.EACCES),
        (404, RemoteError, errno.ENOENT),
        (412, FileChangedError, None),
        (416, FileChangedError, None),
        (400, RemoteError, errno.EIO),
        (429, RemoteError, errno.EIO),
        (500, RemoteError, errno.EIO),
        ("cut", RemoteError, errno.EIO),
        ("reset", RemoteError, errno.EIO),
        ("stall", RemoteError, errno.ETIMEDOUT),
        ("trickle", RemoteError, errno.ETIMEDOUT),
        ("whole", RemoteError, errno.ENOTSUP),
        ("more", RemoteError, errno.EIO),
        ("shift", RemoteError, errno.EIO),
        ("changed", FileChangedError, None),
    ],
)
def test_a_fault_that_stays_is_an_error(
    server: RangeServer, store: Store, known: Described, kind: int | str, kind_of_error: type, number: int | None
) -> None:
    server.faults = [Fault(kind)]
    with pytest.raises(kind_of_error) as caught:
        store.read(known, START, NBYTES)
    error = caught.value
    assert type(error) is kind_of_error
    assert error.path == f"{server.url}/{NAME}"
    assert START <= error.offset < START + NBYTES
    assert getattr(error, "errno", None) == number
    assert "Debug source" not in str(error)


@pytest.mark.parametrize("kind", [401, 403, 404, 412, 416, 400, "whole", "changed"])
def test_what_will_not_pass_is_asked_for_once(
    server: RangeServer, store: Store, known: Described, kind: int | str
) -> None:
    server.faults = [Fault(kind)]
    with pytest.raises((RemoteError, FileChangedError)):
        store.read(known, START, NBYTES)
    assert [request.method for request in server.requests].count("GET") == 1


@pytest.mark.parametrize(("etags", "weak"), [(True, False), (True, True), (False, False)])
def test_another_object_under_the_name_is_noticed(
    server: RangeServer, store: Store, folder: Path, expected: bytes, etags: bool, weak: bool
) -> None:
    server.etags, server.weak = etags, weak
    known = store.described(NAME)
    assert known is not None
    assert store.read(known, START, NBYTES) == expected
    with (folder / NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(FileChangedError, match="changed while it was read"):
        store.read(known, START, NBYTES)


def test_an_object_that_is_gone(store: Store, known: Described, folder: Path) -> None:
    (folder / NAME).unlink()
    with pytest.raises(RemoteError, match=r"byte 1000: it is not there \(any more\)"):
        store.read(known, START, NBYTES)


def test_no_server(impatient: dict[str, Any]) -> None:
    store = Store("http://127.0.0.1:9/models", impatient, threading.Event())
    with pytest.raises(RemoteError, match=r"^http://127.0.0.1:9/models/x: cannot be read"):
        store.described("x")


@pytest.mark.parametrize("kind", ["stall", "trickle", 503])
def test_cancelling_ends_a_range_soon(server: RangeServer, store: Store, known: Described, kind: int | str) -> None:
    server.faults = [Fault(kind)]
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    start = time.monotonic()
    with pytest.raises((CancelledError, RemoteError)):
        list(store.ranges(known, START, NBYTES, stop))
    assert time.monotonic() - start < 0.1 + 1 + 1  # the time for a request, and some


def test_nothing_is_asked_for_once_it_is_cancelled(server: RangeServer, store: Store, known: Described) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        list(store.ranges(known, START, NBYTES, stop))
    assert server.asked() == 0


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://bucket/a", {"nonsense": "1"}),
        ("s3://bucket/a", {"read_timeout": "1s"}),  # which belongs into client_options
        ("s3://bucket/a", {"client_options": {"bogus": "1"}}),
        ("https://host/a", {"region": "eu-west-1"}),
        ("az://container/a", {}),
    ],
)
def test_options_that_obstore_refuses(url: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(OptionError, match=f"^{url} cannot be opened with these storage_options"):
        Store(url, options, threading.Event())


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(MissingDependencyError, match=r"`pip install pyint8\[remote\]`"):
        Store("s3://bucket/a", None, threading.Event())


def test_a_child_that_was_forked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.remote.store._used_by", [os.getpid() + 1])
    with pytest.raises(RemoteError, match="spawn it"):
        Store("s3://bucket/a", None, threading.Event())


def test_a_metadata_service_that_gives_no_credentials() -> None:
    text = "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 8 ms - 403 Forbidden"
    error = failure(ValueError(text), "s3://bucket/a")
    assert isinstance(error, RemoteError)
    assert "no credentials are found" in str(error)
    assert "storage_options=" in str(error)


def test_signatures_are_not_shown() -> None:
    error = failure(ValueError("error sending request for url (https://a/b?sv=1&sig=secret): no"), "az://c/b", 7)
    assert "secret" not in str(error)
    assert "https://a/b?..." in str(error)
