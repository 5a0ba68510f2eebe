"""Checkpoints behind a web server on this machine: what pyint8 costs beside the library that it reads through.

python -m benchmarks.remote                                    # what fits the machine
python -m benchmarks.remote --checkpoint gpt2-xl --runs 3 --json out.json

Each is a process of its own, and so is the server, which counts what it is asked for. Wall-clock times are of both on
the same CPUs; CPU seconds, and the memory above what the process had after its imports, are the reader's alone.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine, page_cache
from benchmarks.checkpoints import NAMES, make
from benchmarks.process import HostMemory

_GB = 1e9
_RANGE = 8 << 20
_READERS = 32
_COUNTED = "/asked"


# --- the server -------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked = 0
        self.lock = threading.Lock()


# Twice: benchmarks and tests know nothing of each other.
class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._begin()

    def do_GET(self) -> None:
        if self.path == _COUNTED:
            body = str(self.server.asked).encode()
            self._headers(200, len(body))
            self.wfile.write(body)
            return
        found = self._begin()
        if found is not None:
            self._send(*found)

    def _begin(self) -> tuple[Path, int, int] | None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self._headers(404, 0)
            return None
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        named = {"ETag": f'"{size:x}"', "Last-Modified": self.date_time_string(int(path.stat().st_mtime))}
        if wanted:
            named["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._headers(206 if wanted else 200, end - start, **named)
        return path, start, end

    def _headers(self, status: int, length: int, **named: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, path: Path, start: int, end: int) -> None:
        with self.server.lock:
            self.server.asked += end - start
        self.wfile.flush()
        with path.open("rb") as file:
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a folder, served by another process."""
    command = [sys.executable, "-m", "benchmarks.remote", "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


def serve(folder: Path) -> None:
    server = _Server(folder)
    print(server.server_port, flush=True)
    server.serve_forever()


def asked_of(url: str) -> int:
    with urllib.request.urlopen(f"{url}{_COUNTED}") as answer:
        return int(answer.read())


# --- the readers ------------------------------------------------------------------------------------------------------


def obstore_alone(url: str, folder: Path, readers: int) -> Callable[[], int]:
    """Ranges of all shards, each into memory of obstore's own."""
    import obstore
    from obstore.store import from_url

    store = from_url(url, client_options={"allow_http": True})
    jobs: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    for name, size in sizes.items():
        for start in range(0, size, _RANGE):
            jobs.put((name, start, min(start + _RANGE, size)))

    def work() -> None:
        while True:
            try:
                name, start, end = jobs.get_nowait()
            except queue.Empty:
                return
            assert len(obstore.get(store, name, options={"range": (start, end)}).bytes()) == end - start

    def run() -> int:
        threads = [threading.Thread(target=work) for _ in range(readers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(sizes.values())

    return run


def engine(url: str, folder: Path, readers: int) -> Callable[[], int]:
    """All tensors through the ring, as on the way to a GPU, but that the slots are then discarded."""
    from pyint8.checkpoint import open_checkpoint
    from pyint8.config import StreamOptions
    from pyint8.remote.folder import opened
    from pyint8.streaming.transport import Transport

    def run() -> int:
        options = StreamOptions(threads=readers).for_remote()
        with opened(url) as here, closing(Transport(options)) as transport:
            checkpoint = open_checkpoint(here)
            lane = transport.engine.add_discarding_device()
            reads = [(transport.file(e.path, e.stamp), e.offset, e.nbytes, 0) for e in checkpoint.values()]
            first = transport.engine.submit(lane, reads, 0, first=False)
            for ticket in range(first, first + len(reads)):
                transport.engine.wait(ticket, 0)
            return checkpoint.nbytes

    return run


def load(url: str, folder: Path, readers: int) -> Callable[[], int]:
    return _load(url, readers)


def load_local(url: str, folder: Path, readers: int) -> Callable[[], int]:
    return _load(str(folder), None)


def _load(path: str, readers: int | None) -> Callable[[], int]:
    import pyint8
    import pyint8.models.transformers.loading

    def run() -> int:
        options = pyint8.StreamOptions(threads=readers)
        _, report = pyint8.load(path, options=options, progress=False, return_report=True)
        return int(report.checkpoint_bytes)

    return run


WAYS = {"obstore": obstore_alone, "engine": engine, "load": load, "load, on the disk": load_local}


def measure(way: str, url: str, folder: Path, readers: int) -> dict[str, Any]:
    """One run, in this process."""
    run = WAYS[way](url, folder, readers)
    before, asked = os.times(), asked_of(url)
    host = HostMemory()
    with host.watched():
        start = time.perf_counter()
        nbytes = run()
        seconds = time.perf_counter() - start
    after = os.times()
    return {
        "way": way,
        "readers": readers,
        "nbytes": nbytes,
        "asked": asked_of(url) - asked,
        "seconds": seconds,
        "user_seconds": after.user - before.user,
        "system_seconds": after.system - before.system,
        **host.record(),
    }


# --- the table --------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.remote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=NAMES, default="llama-1b")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pyint8-benchmarks"), help="for the checkpoints")
    parser.add_argument("--readers", type=int, default=_READERS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.way = parsed.way or list(WAYS)
    return parsed


def run_child(way: str, url: str, folder: Path, readers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.remote", "--readers", str(readers), "--child", way, url, str(folder)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def line(way: str, runs: list[dict[str, Any]]) -> str:
    def of(name: str) -> float:
        return median(float(run[name]) for run in runs)

    gb = of("nbytes") / _GB
    cpu = f"{of('user_seconds') / gb:.2f} + {of('system_seconds') / gb:.2f}"
    return (
        f"{way:20} {of('seconds'):6.2f} s   CPU s/GB {cpu}   asked {of('asked') / of('nbytes'):.4f} x   "
        f"host {of('host_anonymous_peak') / 1e6:.0f} MB"
    )


def main(arguments: list[str]) -> None:
    parsed = parse(arguments)
    if parsed.serve is not None:
        serve(parsed.serve)
    elif parsed.child is not None:
        way, url, folder = parsed.child
        print(json.dumps(measure(way, url, Path(folder), parsed.readers)))
    else:
        compare(parsed)


def compare(parsed: argparse.Namespace) -> None:
    folder = make(parsed.checkpoint, parsed.folder / parsed.checkpoint)
    page_cache.prepare(sorted(folder.glob("*.safetensors")), "hot")
    with serving(folder) as url:
        runs = [run_child(way, url, folder, parsed.readers) for _ in range(parsed.runs) for way in parsed.way]
    for way in parsed.way:
        print(line(way, [run for run in runs if run["way"] == way]))
    if parsed.json is not None:
        found = {"machine": machine.describe(folder), "checkpoint": parsed.checkpoint, "runs": runs}
        parsed.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
