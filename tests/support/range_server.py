"""A web server of a folder that serves ranges, counts them, and fails as it is told to."""

from __future__ import annotations

import functools
import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_PIECE = 1 << 16


@dataclass
class Fault:
    """Something that goes wrong with requests for ranges of a file.

    Attributes:
        kind: A status such as 503, or what `_Handler` has a method for: "cut", "reset", "stall", "trickle", "whole",
            "more", "shift", "changed".
        times: How many requests it happens to; the others are answered.
        beyond: Only to ranges that begin at this byte or behind.
        name: Of the file, its end.
    """

    kind: int | str
    times: int = 1_000_000
    beyond: int = 1
    name: str = ".safetensors"


@dataclass(frozen=True)
class Request:
    """One that was answered, with whatever."""

    method: str
    name: str
    start: int
    nbytes: int


class RangeServer:
    """Serves the files of a folder, at `url`.

    Attributes:
        faults: Looked through at each request; the first that fits happens.
        requests: All so far.
        etags: Whether it says them, and heeds If-Match.
        weak: Whether they are weak.
        absent: The status for what is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.etags = True
        self.weak = False
        self.absent = 404
        self.lock = threading.Lock()
        self.server = _Server(self)
        self.url = f"http://127.0.0.1:{self.server.server_port}/models/tiny"

    def asked(self, end: str = ".safetensors") -> int:
        """The bytes of all ranges that were asked for of such files."""
        return sum(request.nbytes for request in self.requests if request.name.endswith(end))

    def fault_of(self, name: str, start: int) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if name.endswith(fault.name) and start >= fault.beyond and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def content(self, name: str) -> bytes | None:
        """Of a file; None if there is none."""
        path = self.folder / name
        if not path.is_file():
            return None
        found = path.stat()
        with self.lock:  # one reads and hashes, however many ask: a client gives up a server that does either for each
            raw = _content(path, found.st_mtime_ns, found.st_size)
            _digest(raw)
        return raw

    def tag(self, raw: bytes) -> str:
        return ("W/" if self.weak else "") + f'"{_digest(raw)}"'


@functools.lru_cache(maxsize=8)
def _content(path: Path, modified_ns: int, size: int) -> bytes:
    """In one state of the file."""
    return path.read_bytes()


@functools.lru_cache(maxsize=8)
def _digest(raw: bytes) -> str:
    return hashlib.md5(raw).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    """A server for as long as the block lasts."""
    served = RangeServer(folder)
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.server.shutdown()
        served.server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, served: RangeServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.served = served

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        served = self.server.served
        name = self.path.removeprefix("/models/tiny/")
        raw = served.content(name) if self.path.startswith("/models/tiny/") else None
        start, end = self._range(0 if raw is None else len(raw))
        served.requests.append(Request(method, name, start, end - start if method == "GET" else 0))
        fault = served.fault_of(name, start) if method == "GET" else None
        if fault is not None:
            self._fail(fault, raw or b"", start, end)
        elif raw is None:
            self._status(served.absent)
        elif served.etags and self.headers.get("If-Match") not in (None, "*", served.tag(raw)):
            self._status(412)
        else:
            self._begin(raw, start, end)
            self.wfile.write(raw[start:end] if method == "GET" else b"")

    def _range(self, size: int) -> tuple[int, int]:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _begin(self, raw: bytes, start: int, end: int, *, status: int | None = None, length: int | None = None) -> None:
        self.send_response(status or (206 if self.headers.get("Range") else 200))
        self.send_header("Content-Length", str(end - start if length is None else length))
        if self.headers.get("Range") and status is None:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(raw)}")
        if self.server.served.etags:
            self.send_header("ETag", self.server.served.tag(raw))
        self.send_header("Last-Modified", self.date_time_string(int((self.server.served.folder).stat().st_mtime)))
        self.end_headers()

    def _fail(self, fault: Fault, raw: bytes, start: int, end: int) -> None:
        if isinstance(fault.kind, int):
            self._status(fault.kind)
        else:
            getattr(self, f"_{fault.kind}")(raw, start, end)

    def _cut(self, raw: bytes, start: int, end: int) -> None:
        self._begin(raw, start, end)
        self.wfile.write(raw[start : start + (end - start) // 2])
        self.close_connection = True

    def _reset(self, raw: bytes, start: int, end: int) -> None:
        self._begin(raw, start, end)
        self.wfile.write(raw[start : start + (end - start) // 3])
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _stall(self, raw: bytes, start: int, end: int) -> None:
        self._begin(raw, start, end)
        self.wfile.write(raw[start : start + (end - start) // 2])
        self.wfile.flush()
        self.connection.settimeout(60)
        self.connection.recv(1)  # until the client goes
        self.close_connection = True

    def _trickle(self, raw: bytes, start: int, end: int) -> None:
        self._begin(raw, start, end)
        for at in range(start, end):
            self.wfile.write(raw[at : at + 1])
            self.wfile.flush()
            time.sleep(0.05)

    def _whole(self, raw: bytes, start: int, end: int) -> None:
        self._begin(raw, 0, len(raw), status=200)
        self.wfile.write(raw)

    def _more(self, raw: bytes, start: int, end: int) -> None:
        """Says what it was asked for, and sends without an end."""
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(raw)}")
        self.send_header("ETag", self.server.served.tag(raw))
        self.send_header("Last-Modified", self.date_time_string(0))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for _ in range(4096):
            self.wfile.write(bytes(_PIECE))

    def _shift(self, raw: bytes, start: int, end: int) -> None:
        """The range one byte further on, and says so."""
        self._begin(raw, start + 1, end)
        self.wfile.write(raw[start + 1 : end])

    def _changed(self, raw: bytes, start: int, end: int) -> None:
        """The range of another object, whatever If-Match says."""
        other = bytes([*raw[:-1], raw[-1] ^ 1])
        self._begin(other, start, end)
        self.wfile.write(other[start:end])
