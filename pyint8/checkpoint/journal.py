"""What is done of a checkpoint that is being written, so that the work of a killed process can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from types import TracebackType

from pyint8.host.files import open_file
from pyint8.host.writing import create, write_errors


class Journal:
    """Names of tensors that are on the disk; a context manager that closes its file.

    Each line is a JSON list. One that was cut short by a crash does not count.

    Args:
        path: A file, there already or not.
        identity: Of the work. What another work left there does not count.

    Attributes:
        done: The names that were there at the start.

    Raises:
        WriteError: The operating system refused.
    """

    def __init__(self, path: str, identity: str) -> None:
        self._path = path
        with write_errors(path):
            lines = _whole_lines(path) if self.is_of(path, identity) else []
            self.done = frozenset(name for line in lines[1:] for name in line)
            self._file = create(path)
            self.add([identity])
            if self.done:
                self.add(self.done)

    @staticmethod
    def is_of(path: str, identity: str) -> bool:
        """Whether there is a journal of this work."""
        return _whole_lines(path)[:1] == [[identity]]

    def add(self, names: Iterable[str]) -> None:
        """Notes names whose bytes are on the disk; returns once they are noted there, too.

        Raises:
            WriteError: The operating system refused.
        """
        line = json.dumps(list(names)).encode() + b"\n"
        with write_errors(self._path):
            while line:
                line = line[os.write(self._file, line) :]
            os.fdatasync(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)


def _whole_lines(path: str) -> list[list[str]]:
    try:
        with open_file(path) as file:
            whole = [line for line in file if line.endswith(b"\n")]
        return [json.loads(line) for line in whole]
    except (FileNotFoundError, ValueError):
        return []
