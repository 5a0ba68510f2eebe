"""The house: which room may import which, and who alone may import what.

Read from the sources: imports for type checkers and those inside functions count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyint8

PACKAGE = Path(pyint8.__file__).parent

BELOW_STREAMING = {"errors", "host", "config", "checkpoint", "remote", "placement", "report"}
MAY_IMPORT = {
    "errors": set(),
    "host": {"errors"},
    "config": {"errors", "host"},
    "checkpoint": {"errors", "host", "config"},
    "remote": {"errors", "host", "checkpoint"},
    "placement": {"errors", "host", "config"},
    "report": {"errors", "host", "config"},
    "streaming": BELOW_STREAMING,
    "quantizer": BELOW_STREAMING,
    "models": BELOW_STREAMING | {"streaming", "quantizer"},
    "operations": BELOW_STREAMING | {"streaming", "quantizer", "models"},
    "__init__": {"config", "errors", "host", "models", "operations", "report"},
    "run": {"__init__", "host"},
    "cli": BELOW_STREAMING | {"operations", "__init__", "run"},
    "__main__": {"cli"},
}
"""Every room, and those that it may import beside itself."""

SOLE_IMPORTERS = {
    "pyint8._core": {"streaming"},
    "bitsandbytes": {"quantizer"},
    "obstore": {"remote"},
    "accelerate": {"placement", "models"},
    "transformers": {"models", "operations"},
}
"""Packages that only some rooms may import."""


def imports_of(source: str, package: str) -> Iterator[str]:
    """The dotted names that a module in `package` imports: "pyint8.config.Int8Config"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(dotted: str) -> str | None:
    """The room of pyint8 that a dotted name lies in; None for another package."""
    parts = dotted.split(".")
    if parts[0] != "pyint8":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in {*MAY_IMPORT, "_core"} else "__init__"


def forbidden(room: str, imported: str) -> str | None:
    """What is wrong with an import; None for one that the house allows."""
    for package, rooms in SOLE_IMPORTERS.items():
        if (imported == package or imported.startswith(f"{package}.")) and room not in rooms:
            return f"{room} imports {imported}, which only {sorted(rooms)} may"
    target = room_of(imported)
    if target in (None, room, "_core") or target in MAY_IMPORT[room]:
        return None
    return f"{room} imports {imported}: its arrows lead to {sorted(MAY_IMPORT[room])} alone"


def modules() -> Iterator[tuple[str, str, Path]]:
    """(room, package, file) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        package = ".".join(["pyint8", *parts[:-1]])
        yield parts[0], package, path


@pytest.mark.parametrize(("room", "package", "path"), list(modules()), ids=lambda value: getattr(value, "name", ""))
def test_arrows_lead_down(room: str, package: str, path: Path) -> None:
    assert room in MAY_IMPORT, f"{path} is in no room of the house"
    found = [forbidden(room, imported) for imported in imports_of(path.read_text(), package)]
    assert not list(filter(None, found))


def test_the_house_has_no_circle() -> None:
    done: set[str] = set()
    while left := MAY_IMPORT.keys() - done:
        free = {room for room in left if MAY_IMPORT[room] <= done}
        assert free, f"these lead to each other: {sorted(left)}"
        done |= free


@pytest.mark.parametrize(
    ("room", "line", "wrong"),
    [
        ("config", "from pyint8.models.transformers.hooks import METHOD", True),
        ("config", "if TYPE_CHECKING:\n    import pyint8.operations.load", True),
        ("checkpoint", "def f():\n    from transformers.utils import peft_utils", True),
        ("checkpoint", "from .entry import Entry", False),
        ("checkpoint", "from ..quantizer import Int8Quantizer", True),
        ("quantizer", "import bitsandbytes.nn", False),
        ("models", "import bitsandbytes.nn", True),
        ("models", "from pyint8._core import Engine", True),
        ("models", "from pyint8 import _core", True),
        ("streaming", "from pyint8 import _core", False),
        ("streaming", "from pyint8.quantizer import weights", True),
        ("quantizer", "from pyint8.streaming.stream import TensorStream", True),
        ("placement", "from pyint8.quantizer import device_of", True),
        ("models", "import torch, json", False),
    ],
)
def test_an_arrow_that_is_planted_is_found(room: str, line: str, wrong: bool) -> None:
    found = [forbidden(room, imported) for imported in imports_of(line, f"pyint8.{room}")]
    assert any(found) == wrong


PUBLIC_IN_TRANSFORMERS = re.compile(r"transformers(\.(quantizers|utils)(\.register_\w+|\.logging)?|\.[A-Z]\w*)?")
"""What modules other than compat import of transformers: what its documentation shows."""


def private_uses(source: str) -> Iterator[str]:
    """What a module of models/transformers names of transformers' insides: imports, and attributes of the model."""
    for imported in imports_of(source, "pyint8.models.transformers"):
        if imported.split(".")[0] == "transformers" and not PUBLIC_IN_TRANSFORMERS.fullmatch(imported):
            yield imported
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner.split(".")[-1].lstrip("_") in ("model", "config", "hf_quantizer"):
                yield f"{owner}.{node.attr}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models" / "transformers").glob("*.py")), ids=lambda path: path.name)
def test_only_compat_names_what_is_private_to_transformers(path: Path) -> None:
    found = list(private_uses(path.read_text()))
    assert bool(found) == (path.name == "compat.py"), found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from transformers.core_model_loading import SkipParameters", True),
        ("from transformers import BitsAndBytesConfig", False),
        ("from transformers.quantizers import register_quantizer", False),
        ("import transformers", False),
        ("model._keep_in_fp32_modules", True),
        ("self._model._no_split_modules", True),
        ("self._model.base_model_prefix", False),
        ("model.__class__", False),
    ],
)
def test_a_private_name_that_is_planted_is_found(line: str, found: bool) -> None:
    assert bool(list(private_uses(line))) == found
