"""`pyint8 inspect PATH`: what is in a checkpoint."""

from __future__ import annotations

import argparse

from pyint8.cli import arguments as args
from pyint8.cli.text import devices, field, sizes, verdict
from pyint8.cli.verb import Output, Verb
from pyint8.operations.inspect import InspectedTensor, Inspection, inspect, inspect_headers
from pyint8.report import readable_size, skipped_by_reason


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder with a checkpoint, a file, a hub id, or a URL")
    parser.add_argument("--headers", action="store_true", help="the facts of headers alone, in a moment")
    parser.add_argument("--tensors", action="store_true", help="list all tensors (JSON always has them)")
    args.add_quantization(parser)
    args.add_placement(parser, plans_only=True)
    args.add_hub(parser)


def _run(arguments: argparse.Namespace, out: Output) -> int:
    if arguments.headers:
        found = inspect_headers(arguments.path, **args.placement(arguments))
    else:
        found = inspect(arguments.path, **args.placement(arguments))
    out.value(found.to_dict())
    _print(found, out)
    if arguments.tensors:
        for tensor in found.tensors:
            out.line(_tensor(tensor))
    return 0


def _print(found: Inspection, out: Output) -> None:
    out.line(field("checkpoint", found.path))
    out.line(field("tensors", f"{len(found.tensors)} in {_files(found)}, {readable_size(found.nbytes)}"))
    out.line(field("stored as", sizes(found.dtypes)))
    if found.model is None:
        out.line(field("note", str(found.note)))
        return
    out.line(field("model", found.model))
    total = "nothing" if found.int8_nbytes is None else readable_size(found.int8_nbytes)
    out.line(field("as int8", f"{total} ({len(found.int8)} modules; {sizes(found.int8_kinds)})"))
    out.line(field("not int8", readable_size(sum(found.skipped_bytes.values()))))
    for line in skipped_by_reason(found.skipped, found.skipped_bytes):
        out.line(line)
    for one, other in found.ties_assumed.items():
        out.line(field("assumed", f"{one} has the values of {other}, with which the model shares memory"))
    for line in devices(found):
        out.line(line)
    out.line(verdict(found))


def _files(found: Inspection) -> str:
    return "1 file" if len(found.files) == 1 else f"{len(found.files)} files"


def _tensor(tensor: InspectedTensor) -> str:
    return (
        f"{tensor.name}  {tensor.dtype} {list(tensor.shape)}  {tensor.nbytes} bytes at {tensor.offset} of {tensor.file}"
    )


VERB = Verb(
    "inspect",
    "show what is in a checkpoint, what would become int8, and what that would take; no tensor is read",
    (
        "pyint8 inspect path/to/Llama-8B",
        "pyint8 inspect path/to/Llama-8B --headers --tensors",
        "pyint8 inspect model.safetensors --json | jq .dtypes",
    ),
    _add_arguments,
    _run,
)
