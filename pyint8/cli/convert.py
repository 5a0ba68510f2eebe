"""`pyint8 convert SRC DST`: the int8 form of a checkpoint, in a folder or on the hub."""

from __future__ import annotations

import argparse

from pyint8.cli import arguments as args
from pyint8.cli.text import field
from pyint8.cli.verb import Output, Verb
from pyint8.operations.common import launched_group
from pyint8.operations.convert import convert
from pyint8.operations.push import push_folder, require_repository
from pyint8.report import LoadReport


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    args.add_path(parser, "source", "SRC")
    parser.add_argument("folder", metavar="DST", help="where to; its other files stay")
    parser.add_argument("--device", metavar="NAME", type=args.device, help="where to quantize: cpu, cuda or cuda:1")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", type=args.size, help="of a file; 5GB")
    parser.add_argument("--checksums", action="store_true", help="write the CRC-32C of each tensor, too")
    parser.add_argument(
        "--fused-experts", action="store_true", help="int8 experts as one tensor a layer; see --experts"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this repository afterwards")
    parser.add_argument("--private", action="store_true", help="if that repository is made, make it private")
    args.add_progress(parser)
    args.add_quantization(parser)
    args.add_hub(parser)
    parser.set_defaults(refuse=parser.error)


def _run(arguments: argparse.Namespace, out: Output) -> int:
    if arguments.private and arguments.push_to_hub is None:
        arguments.refuse("--private is for --push-to-hub")
    with launched_group() as (group, rank):
        if arguments.push_to_hub is not None and rank == 0:  # before hours of work
            require_repository(arguments.push_to_hub, private=arguments.private)
        report = convert(
            arguments.source,
            arguments.folder,
            device=arguments.device,
            dtype=arguments.dtype,
            config=args.config(arguments),
            max_shard_size=arguments.max_shard_size,
            checksums=arguments.checksums,
            fused_experts=arguments.fused_experts,
            progress=args.progress(arguments),
            process_group=group,
            **args.hub(arguments),
        )
    if rank == 0:  # of several one speaks
        _tell(arguments, report, out)
    return 0


def _tell(arguments: argparse.Namespace, report: LoadReport, out: Output) -> None:
    out.line(str(report))
    out.line(field("written", arguments.folder))
    pushed = None
    if arguments.push_to_hub is not None:
        pushed = push_folder(arguments.folder, arguments.push_to_hub)
        out.line(field("pushed", pushed))
    out.value({"folder": arguments.folder, "pushed": pushed, "report": report.to_dict()})


VERB = Verb(
    "convert",
    "write the int8 form of a checkpoint, never holding the model; continues where it was interrupted",
    (
        "pyint8 convert path/to/Llama-70B llama-70b-int8",
        "pyint8 convert meta-llama/Llama-3.1-8B llama-8b-int8 --push-to-hub me/Llama-3.1-8B-int8 --private",
        "torchrun --nproc-per-node 4 -m pyint8 convert path/to/Llama-70B llama-70b-int8",
        "pyint8 convert path/to/Llama-8B int8 --device cpu --skip lm_head --skip model.layers.0.mlp",
    ),
    _add_arguments,
    _run,
)
