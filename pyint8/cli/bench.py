"""`pyint8 bench`: how fast loads are here, beside what the hardware gives."""

from __future__ import annotations

import argparse

from pyint8.cli import arguments as args
from pyint8.cli.text import field
from pyint8.cli.verb import Output, Verb
from pyint8.operations.bench import Speed, bench


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", metavar="DIR", help="on the disk to measure; a file is written there, then removed")
    parser.add_argument("--size", metavar="SIZE", type=args.size, help="of that file; 1GiB with a GPU, 256MiB without")


def _run(arguments: argparse.Namespace, out: Output) -> int:
    found: list[Speed] = []
    for speed in bench(arguments.folder, arguments.size):
        found.append(speed)
        rate = "-" if speed.gigabytes_per_second is None else f"{speed.gigabytes_per_second:.2f} GB/s"
        out.line(field(speed.name, f"{rate:<12}{speed.note}"))
    out.value({"speeds": [speed.to_dict() for speed in found]})
    return 0


VERB = Verb(
    "bench",
    "measure loads on this machine beside its bus, page cache and disk, in less than a minute",
    ("pyint8 bench", "pyint8 bench --folder /models --size 4GiB", "pyint8 bench --json | jq .speeds"),
    _add_arguments,
    _run,
)
