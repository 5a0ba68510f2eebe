"""`pyint8 run PROGRAM ...`: a program whose int8 loads by transformers go through pyint8."""

from __future__ import annotations

import argparse

from pyint8.cli.verb import Output, Verb


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pyint8 run [-h] (PROGRAM | -m MODULE) [ARGUMENT ...]"
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as Python's -m does")
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="PROGRAM", help="a script, or a Python program by its name on PATH"
    )
    parser.set_defaults(refuse=parser.error)


def _run(arguments: argparse.Namespace, out: Output) -> int:
    from pyint8.run import main

    given = arguments.program if arguments.module is None else ["-m", *arguments.module]
    if given in ([], ["-m"]):
        arguments.refuse("say which program to run")
    main(given)
    return 0


VERB = Verb(
    "run",
    "run a Python program with its int8 loads by transformers going through pyint8",
    (
        "pyint8 run script.py --its --arguments",
        "pyint8 run lm_eval --model hf --model_args pretrained=path,load_in_8bit=True",
        "pyint8 run -m lm_eval --model hf",
    ),
    _add_arguments,
    _run,
    has_json=False,  # standard output is the program's
)
