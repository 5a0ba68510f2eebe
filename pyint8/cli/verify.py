"""`pyint8 verify PATH`: whether a checkpoint is whole, and what its source gives."""

from __future__ import annotations

import argparse

from pyint8.cli import arguments as args
from pyint8.cli.text import field
from pyint8.cli.verb import NO, Output, Verb
from pyint8.operations.verify import Finding, verify
from pyint8.report import readable_size


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    args.add_path(parser)
    parser.add_argument("--against", metavar="SOURCE", help="the 16-bit checkpoint that it was made of")
    parser.add_argument("--device", metavar="NAME", type=args.device, help="where the source is quantized again")
    args.add_progress(parser)
    args.add_hub(parser)


def _run(arguments: argparse.Namespace, out: Output) -> int:
    found = verify(
        arguments.path,
        against=arguments.against,
        device=arguments.device,
        progress=args.progress(arguments),
        **args.hub(arguments),
    )
    for finding in found.findings:
        out.line(_line(finding))
    out.line(
        field("read", f"{readable_size(found.nbytes)}, {found.tensors} tensors, {found.int8_weights} of them int8")
    )
    if found.against is not None:
        out.line(field("compared", f"{found.compared} tensors with {found.against}"))
    out.line(field("sound", "yes" if found.is_sound else f"no: {len(found.findings)} findings"))
    out.value(found.to_dict())
    return 0 if found.is_sound else NO


def _line(finding: Finding) -> str:
    place = [finding.path, None if finding.offset is None else f"byte {finding.offset}"]
    where = ", ".join(each for each in (finding.tensor, *place) if each is not None)
    return f"{where}: {finding.problem}" if where else finding.problem


VERB = Verb(
    "verify",
    "read all of a checkpoint, and list what is wrong with it; exit code 3 if anything is",
    (
        "pyint8 verify llama-8b-int8",
        "pyint8 verify llama-8b-int8 --against path/to/Llama-8B",
        "pyint8 verify llama-8b-int8 --json | jq '.findings[].tensor'",
    ),
    _add_arguments,
    _run,
)
