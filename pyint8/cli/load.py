"""`pyint8 load PATH`: loads a model, and shows the report and first tokens."""

from __future__ import annotations

import argparse
from dataclasses import replace

from pyint8.cli import arguments as args
from pyint8.cli.text import field
from pyint8.cli.verb import Output, Verb
from pyint8.config import StreamOptions
from pyint8.operations.cached import wait_for_fills
from pyint8.operations.generate import generate
from pyint8.operations.load import load
from pyint8.report.timeline import require_drawable

_TOKENS = 20


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    args.add_path(parser)
    parser.add_argument("--generate", metavar="TEXT", help="go on with this text, by the likeliest tokens")
    parser.add_argument("--tokens", type=int, metavar="NUMBER", help=f"how many to generate; {_TOKENS}")
    parser.add_argument("--offload-folder", metavar="DIR", help='for modules that a device map puts on "disk"')
    parser.add_argument(
        "--cache", nargs="?", const=True, default=False, metavar="DIR", help="keep the int8 form, and use it"
    )
    parser.add_argument(
        "--timeline", metavar="FILE", help="what was done when: .png, .svg, .pdf, or .json for Perfetto"
    )
    args.add_progress(parser)
    args.add_placement(parser, plans_only=False)
    args.add_quantization(parser)
    args.add_hub(parser)
    parser.set_defaults(refuse=parser.error)


def _run(arguments: argparse.Namespace, out: Output) -> int:
    if arguments.tokens is not None and arguments.generate is None:
        arguments.refuse("--tokens is for --generate")
    if arguments.timeline is not None:
        require_drawable(arguments.timeline)  # before the load
    options = StreamOptions.from_environment()
    options = replace(options, timeline=options.timeline or arguments.timeline is not None)
    model, report = load(
        arguments.path,
        return_report=True,
        offload_folder=arguments.offload_folder,
        progress=args.progress(arguments),
        cache=arguments.cache,
        options=options,
        **args.placement(arguments),
    )
    out.line(str(report))
    if report.timeline is not None and arguments.timeline is not None:
        report.timeline.save(arguments.timeline)
        out.line(field("timeline", arguments.timeline))
    text = None
    if arguments.generate is not None:
        tokens = _TOKENS if arguments.tokens is None else arguments.tokens
        text = generate(model, arguments.path, arguments.generate, tokens, **args.hub(arguments))
        out.line(field("generated", text))
    wait_for_fills()  # what was asked for
    out.value({"model": type(model).__name__, "generated": text, "report": report.to_dict()})
    return 0


VERB = Verb(
    "load",
    "load a model as int8, and show the report and, if asked to, first tokens",
    (
        "pyint8 load path/to/Llama-8B",
        'pyint8 load path/to/Llama-8B --generate "The bus is" --tokens 40',
        "pyint8 load path/to/Llama-8B --timeline load.png",
        "pyint8 load path/to/Llama-8B --device-map cuda:1 --json | jq .report.seconds",
    ),
    _add_arguments,
    _run,
)
