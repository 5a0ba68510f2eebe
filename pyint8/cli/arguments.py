"""Arguments that several verbs have, and what they mean in Python."""

from __future__ import annotations

import argparse
from typing import Any

from pyint8.config import Int8Config

_PLANS = "auto, balanced, balanced_low_0 or sequential"


def add_path(parser: argparse.ArgumentParser, name: str = "path", metavar: str = "PATH") -> None:
    parser.add_argument(name, metavar=metavar, help="a folder with a checkpoint, a hub id, or a URL (s3://...)")


def add_hub(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the checkpoint is")
    group.add_argument("--revision", metavar="NAME", help="a branch, tag or commit of the hub's repository")
    group.add_argument("--subfolder", metavar="NAME", help="the folder inside of PATH")
    group.add_argument(
        "--storage-option",
        action="append",
        type=storage_option,
        metavar="KEY=VALUE",
        help="for a URL: region=eu-west-1, endpoint=https://... and so on; may be repeated",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what becomes int8")
    group.add_argument("--dtype", default="auto", metavar="NAME", help="of the rest: float16, bfloat16 or auto")
    group.add_argument(
        "--skip", action="append", metavar="MODULE", help="a module to leave as it is, such as lm_head; may be repeated"
    )
    group.add_argument(
        "--experts", action="store_true", default=None, help="the experts of a mixture too, which are 16 bit otherwise"
    )
    group.add_argument("--threshold", type=float, metavar="NUMBER", help="of LLM.int8(); 6.0 unless given")


def add_placement(parser: argparse.ArgumentParser, *, plans_only: bool) -> None:
    group = parser.add_argument_group("where it goes")
    known = _PLANS if plans_only else f"{_PLANS}, or a device: cpu, cuda:1, 1"
    group.add_argument("--device-map", default="auto", metavar="MAP", type=device, help=f"{known}; auto unless given")
    group.add_argument(
        "--max-memory",
        action="append",
        type=memory,
        metavar="DEVICE=SIZE",
        help="memory to use on a device, such as 0=20GiB or cpu=64GB; may be repeated, or joined by commas",
    )
    group.add_argument(
        "--fp32-cpu-offload", action="store_true", help="allow modules on the CPU and the disk beside a GPU"
    )
    group.add_argument("--headroom", metavar="SIZE", type=size, help="use all of every GPU's memory but this, say 2GiB")


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", action="store_true", help="no bar, also on a terminal")


def device(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def memory(text: str) -> dict[int | str, int | str]:
    """Of "0=20GiB,cpu=64GB"."""
    found: dict[int | str, int | str] = {}
    for part in text.split(","):
        name, equals, limit = part.partition("=")
        if not (name and equals and limit):
            raise argparse.ArgumentTypeError(f"{part!r} is not DEVICE=SIZE, such as 0=20GiB or cpu=64GB")
        found[device(name)] = size(limit)
    return found


def storage_option(text: str) -> tuple[str, str]:
    """Of "region=eu-west-1"."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{name!r} is not KEY=VALUE, such as region=eu-west-1")
    return name, value


def max_memory(arguments: argparse.Namespace) -> dict[int | str, int | str] | None:
    if arguments.max_memory is None:
        return None
    return {name: limit for given in arguments.max_memory for name, limit in given.items()}


def config(arguments: argparse.Namespace) -> Int8Config | None:
    """None where nothing was given: an int8 checkpoint has its own."""
    given: dict[str, Any] = {
        "skip_modules": arguments.skip,
        "threshold": arguments.threshold,
        "experts": arguments.experts,
        "fp32_cpu_offload": getattr(arguments, "fp32_cpu_offload", False) or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return Int8Config(**given) if given else None


def hub(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords for from_pretrained, and those that say how a URL is read."""
    names = ("revision", "subfolder", "trust_remote_code")
    found = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    return found if arguments.storage_option is None else {**found, "storage_options": dict(arguments.storage_option)}


def placement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `pyint8.load` and `pyint8.inspect`."""
    return {
        "device_map": arguments.device_map,
        "max_memory": max_memory(arguments),
        "headroom": arguments.headroom,
        "dtype": arguments.dtype,
        "config": config(arguments),
        **hub(arguments),
    }


def progress(arguments: argparse.Namespace) -> bool | None:
    return False if arguments.no_progress else None
