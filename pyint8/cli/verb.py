"""What every verb of the command line is made of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

NO = 3
"""The exit code of verbs that answer a question, where the answer is no."""


class Output:
    """Where a verb prints: lines for people, or one JSON value and nothing else.

    Args:
        stream: Written to.
        as_json: Print the value instead of lines.
    """

    def __init__(self, stream: TextIO, *, as_json: bool) -> None:
        self._stream = stream
        self._as_json = as_json

    def line(self, text: str = "") -> None:
        if not self._as_json:
            print(text, file=self._stream, flush=True)

    def value(self, value: Any) -> None:
        if self._as_json:
            print(json.dumps(value, indent=2), file=self._stream, flush=True)


@dataclass(frozen=True)
class Verb:
    """A verb, which is a module in this folder that has one as `VERB`.

    Attributes:
        name: As it is typed.
        summary: One line.
        examples: Command lines.
        add_arguments: Declares its arguments.
        run: Does it, and returns the exit code.
        has_json: Whether it takes --json.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace, Output], int]
    has_json: bool = True
