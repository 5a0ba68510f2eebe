"""What is done of a checkpoint that is being written, so that the work of a killed process can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from pyint8.host.files import open_file
from pyint8.host.writing import create, write_errors


class Journal:
    """Names of tensors that are on the disk; a context manager that closes its file.

    Its first line is the identity, in JSON, each other an object of names and checksums. One that was cut short by a
    crash does not count.

    Args:
        path: A file, there already or not.
        identity: Of the work. What another work left there does not count.
        noted: What is there at the start, in place of what the file has.

    Attributes:
        done: The names that were there at the start.
        checksums: Of those among them that were noted with one.

    Raises:
        WriteError: The operating system refused.
    """

    def __init__(self, path: str, identity: str, noted: Mapping[str, int | None] | None = None) -> None:
        self._path = path
        with write_errors(path):
            if noted is None:
                noted = self.read(path) if self.is_of(path, identity) else {}
            self.done = frozenset(noted)
            self.checksums = {name: checksum for name, checksum in noted.items() if checksum is not None}
            self._file = create(path)
        try:
            self._write(identity)
            if noted:
                self.add(noted)
        except BaseException:
            os.close(self._file)
            raise

    @staticmethod
    def is_of(path: str, identity: str) -> bool:
        """Whether there is a journal of this work."""
        return _whole_lines(path)[:1] == [identity]

    @staticmethod
    def read(path: str) -> dict[str, int | None]:
        """The names in a journal, and their checksums."""
        return {name: checksum for line in _whole_lines(path)[1:] for name, checksum in line.items()}

    def add(self, noted: Mapping[str, int | None]) -> None:
        """Notes names whose bytes are on the disk, and their checksums; returns once they are noted there, too.

        Raises:
            WriteError: The operating system refused.
        """
        self._write(noted)

    def _write(self, value: object) -> None:
        line = json.dumps(value).encode() + b"\n"
        with write_errors(self._path):
            while line:
                line = line[os.write(self._file, line) :]
            os.fdatasync(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with write_errors(self._path):
            os.close(self._file)


def _whole_lines(path: str) -> list[Any]:
    try:
        with open_file(path) as file:
            whole = [line for line in file if line.endswith(b"\n")]
        return [json.loads(line) for line in whole]
    except (FileNotFoundError, ValueError):
        return []
