"""`pyint8 plan PATH`: will it fit, where does it go, and how much is left."""

from __future__ import annotations

import argparse
from typing import Any

from pyint8.cli import arguments as args
from pyint8.cli.text import devices, field, verdict
from pyint8.cli.verb import NO, Output, Verb
from pyint8.errors import OptionError
from pyint8.operations.inspect import Inspection, inspect

_MARGINS = "without it a tenth to a fifth of the GPUs' memory stays unused, as transformers plans"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    args.add_path(parser)
    args.add_placement(parser, plans_only=True)
    args.add_quantization(parser)
    args.add_hub(parser)


def _run(arguments: argparse.Namespace, out: Output) -> int:
    found = inspect(arguments.path, **args.placement(arguments))
    if found.model is None:
        raise OptionError(f"there is no plan for {found.path}: {found.note}")
    out.value(_value(found))
    out.line(field("model", f"{found.model} in {found.path}"))
    for line in devices(found):
        out.line(line)
    out.line(verdict(found))
    if not found.fits and arguments.headroom is None:
        out.line(field("try", f"--headroom 1GiB: {_MARGINS}"))
    for module, device in found.device_map.items():
        out.line(field("", f"{module or 'all'} -> {device}"))
    return 0 if found.fits else NO


def _value(found: Inspection) -> dict[str, Any]:
    names = [*found.device_memory, *(found.device_bytes.keys() - found.device_memory.keys())]
    return {
        "path": found.path,
        "model": found.model,
        "fits": found.fits,
        "problem": found.problem,
        "devices": {name: _device(found, name) for name in names},
        "device_map": dict(found.device_map),
    }


def _device(found: Inspection, name: str) -> dict[str, int | None]:
    used, memory = found.device_bytes.get(name, 0), found.device_memory.get(name)
    return {"used": used, "memory": memory, "left": None if memory is None else memory - used}


VERB = Verb(
    "plan",
    "say whether a model fits, where it goes and how much is left, here or on another machine",
    (
        "pyint8 plan path/to/Llama-8B",
        "pyint8 plan path/to/Llama-70B --max-memory 0=40GiB,1=40GiB,cpu=100GB",
        "pyint8 plan path/to/Llama-8B --headroom 2GiB --json && ./serve.sh",
    ),
    _add_arguments,
    _run,
)
