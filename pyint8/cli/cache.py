"""`pyint8 cache list | clear`: the int8 forms that `pyint8.load(..., cache=True)` keeps."""

from __future__ import annotations

import argparse
import time

from pyint8.cli.text import field
from pyint8.cli.verb import Output, Verb
from pyint8.operations.cached import opened_folder
from pyint8.report import readable_size


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "clear"), help="show what there is, or remove it")
    parser.add_argument("--folder", metavar="DIR", help="another cache than the user's")


def _run(arguments: argparse.Namespace, out: Output) -> int:
    folder = opened_folder(True if arguments.folder is None else arguments.folder)
    entries = folder.entries() if arguments.action == "list" else folder.clear()
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        out.line(f"{readable_size(entry.nbytes):>10}  {used}  {entry.source}")
    done = "there are" if arguments.action == "list" else "removed"
    total = readable_size(sum(entry.nbytes for entry in entries))
    out.line(field(done, f"{len(entries)}, {total}, in {folder.root}"))
    out.value({"folder": folder.root, arguments.action: [entry.to_dict() for entry in entries]})
    return 0


VERB = Verb(
    "cache",
    "list or clear the int8 forms that loads with a cache keep",
    ("pyint8 cache list", "pyint8 cache list --json | jq '.list[].nbytes'", "pyint8 cache clear --folder /data/int8"),
    _add_arguments,
    _run,
)
