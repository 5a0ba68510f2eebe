"""`pyint8 VERB ...`: finds the verb, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TextIO

from pyint8.cli import bench, cache, convert, doctor, inspect, load, plan, run, verify
from pyint8.cli.verb import NO, Output, Verb
from pyint8.errors import Pyint8Error

VERBS: tuple[Verb, ...] = (
    inspect.VERB,
    plan.VERB,
    load.VERB,
    convert.VERB,
    verify.VERB,
    cache.VERB,
    run.VERB,
    doctor.VERB,
    bench.VERB,
)

FAILED = 1
INTERRUPTED = 130
_PIPE_CLOSED = 141  # what a shell has for SIGPIPE
_CODES = f"exit codes: 0 done, {FAILED} an error, 2 wrong usage, {NO} the answer is no, {INTERRUPTED} Ctrl-C"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: Those after the program's name; None for the process's own.

    Returns:
        The exit code.
    """
    parsed = _parser().parse_args(arguments)
    verb: Verb = parsed.verb
    try:
        with _standard_output(for_json=parsed.json) as stream:
            return verb.run(parsed, Output(stream, as_json=parsed.json))
    except Pyint8Error as error:
        print(f"pyint8 {verb.name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"pyint8 {verb.name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has enough
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return _PIPE_CLOSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyint8",
        description="Hugging Face checkpoints as bitsandbytes int8 models, at the speed of the bus.",
        epilog=f"`pyint8 VERB --help` has examples.\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pyint8 {_version()}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        _add(verb, verbs)
    return parser


def _add(verb: Verb, verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        verb.name,
        help=verb.summary,
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        epilog="\n".join(["examples:", *(f"  {example}" for example in verb.examples), "", _CODES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb, json=False)
    if verb.has_json:
        parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
    verb.add_arguments(parser)


def _version() -> str:
    return metadata.version("pyint8")


@contextmanager
def _standard_output(*, for_json: bool) -> Iterator[TextIO]:
    """Standard output; while it is kept for JSON, what anything else prints there goes to standard error."""
    if not for_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    number = sys.stdout.fileno()
    with open(os.dup(number), "w", encoding="utf-8") as own:
        os.dup2(sys.stderr.fileno(), number)
        try:
            yield own
            own.flush()
        finally:
            sys.stdout.flush()
            os.dup2(own.fileno(), number)
