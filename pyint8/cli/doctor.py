"""`pyint8 doctor`: what of this machine would hold a load back, and how to mend it."""

from __future__ import annotations

import argparse

from pyint8.cli.text import field
from pyint8.cli.verb import NO, Output, Verb
from pyint8.operations.doctor import examine
from pyint8.report.finding import Finding

_NAMES = 18


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help="a checkpoint, to measure the storage it lies on")


def _run(arguments: argparse.Namespace, out: Output) -> int:
    found: list[Finding] = []
    for finding in examine(arguments.path):  # each is printed as it is found
        found.append(finding)
        out.line(f"{finding.state:<9}{finding.name:<{_NAMES}}{finding.value}")
        for name, text in (("means", finding.consequence), ("mend", finding.mend)):
            if text is not None:
                out.line(" " * 9 + field(name, text))
    works = all(finding.state != "broken" for finding in found)
    out.value({"works": works, "findings": [finding.to_dict() for finding in found]})
    return 0 if works else NO


VERB = Verb(
    "doctor",
    "look at packages, GPUs, bus, memory and storage: what would hold a load back, and how to mend it",
    (
        "pyint8 doctor",
        "pyint8 doctor path/to/Llama-8B",
        "pyint8 doctor --json | jq '.findings[] | select(.state != \"ok\")'",
    ),
    _add_arguments,
    _run,
)
