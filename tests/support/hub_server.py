"""As much of the Hugging Face hub as a download asks for, from a folder, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "3" * 40


class HubServer:
    """Serves `folder` as the repository `name`.

    Attributes:
        url: For HF_ENDPOINT.
        sent: Names of the files whose contents were asked for, in order.
        cut: Names of files that the connection does not live to the end of.
        token: Requests without it get "not found"; None serves all.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.sent: list[str] = []
        self.cut: set[str] = set()
        self.token: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                path = self.path.partition("?")[0]
                prefix = f"/{name}/resolve/"
                file = folder / path.removeprefix(prefix).partition("/")[2]
                if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._say(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, with_body)
                elif path.startswith(prefix) and file.is_file():
                    self._file(file, with_body=with_body)
                elif f"{name}/tree/" in path:
                    files = [
                        {"type": "file", "path": entry.name, "size": entry.stat().st_size, "oid": "0" * 40}
                        for entry in sorted(folder.iterdir())
                    ]
                    self._say(200, json.dumps(files).encode(), {}, with_body)
                elif path.rstrip("/").endswith(name) or f"{name}/revision/" in path:
                    siblings = [{"rfilename": entry.name} for entry in sorted(folder.iterdir())]
                    self._say(
                        200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {}, with_body
                    )
                else:
                    self._say(404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound"}, with_body)

            def _file(self, file: Path, *, with_body: bool) -> None:
                content = file.read_bytes()
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                if with_body:
                    hub.sent.append(file.name)
                if with_body and file.name in hub.cut:
                    self._say(206 if start else 200, content[start:], headers, False)
                    self.wfile.write(content[start : start + (len(content) - start) // 2])
                    self.close_connection = True
                    return
                self._say(206 if start else 200, content[start:], headers, with_body)

            def _say(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()
