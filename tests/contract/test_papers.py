"""The papers beside the code: what they link to is there, and so are the sections that the code names."""

from __future__ import annotations

import json
import re
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

import pyint8

ROOT = next(path.parent for path in Path(__file__).resolve().parents if path.name == "tests")
PAPERS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `docs/performance.md`, `csrc/core/`, `SECURITY.md`: paths in code type, from the root of the tree.
NAMED_PATH = re.compile(r"`((?:benchmarks|csrc|docs|pyint8|tests|\.ci)/[\w./-]*|[A-Z]+\.md)`")
NAMED_TEST = re.compile(r"`((?:test|check)_\w+)`")
# `TensorStream`, `Engine.submit`: what ARCHITECTURE.md follows a tensor through.
NAMED_CLASS = re.compile(r"`([A-Z][a-z]\w+)(?:\.(\w+))?`")
FOREIGN_CLASSES = {"Int8Params", "Linear8bitLt"}
EXPERIMENT = re.compile(r'docs/performance\.md, "([^"]+)"')

in_source_tree = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the tests are apart from their tree")


def anchor(title: str) -> str:
    """What a heading is linked to as."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def titles(paper: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", paper.read_text(), re.MULTILINE)


def is_there(paper: Path, link: str) -> bool:
    """Whether a relative link, or one to a heading, leads to something."""
    path, _, fragment = link.partition("#")
    target = (paper.parent / path) if path else paper
    return target.exists() and (not fragment or fragment in map(anchor, titles(target)))


@in_source_tree
@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_something(paper: Path) -> None:
    links = [link for link in LINK.findall(paper.read_text()) if not link.startswith(("https://", "http://"))]
    assert not [link for link in links if not is_there(paper, link)]


@in_source_tree
@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_papers_name_are_there(paper: Path) -> None:
    assert not [path for path in NAMED_PATH.findall(paper.read_text()) if not (ROOT / path).exists()]


@in_source_tree
def test_tests_that_papers_name_are_there() -> None:
    named = set(chain.from_iterable(NAMED_TEST.findall(paper.read_text()) for paper in PAPERS))
    there = {path.stem for path in (ROOT / "tests").rglob("*")}
    assert named
    assert not named - there


@in_source_tree
def test_names_that_the_architecture_follows_are_there() -> None:
    sources = [*(ROOT / "pyint8").rglob("*.py"), *(ROOT / "csrc").rglob("*.hpp"), ROOT / "pyint8" / "_core.pyi"]
    source = "\n".join(path.read_text() for path in sources)
    named = set(NAMED_CLASS.findall((ROOT / "ARCHITECTURE.md").read_text()))
    assert named
    for name, member in named:
        assert name in FOREIGN_CLASSES or re.search(rf"\b(class|struct) {name}\b", source), name
        assert re.search(rf"\b{member}\b", source), f"{name}.{member}"


@in_source_tree
def test_readme_is_whole_without_its_tree() -> None:
    """On PyPI a relative link leads nowhere: the README has none but its chart, whose text says what it shows."""
    links = [link for link in LINK.findall((ROOT / "README.md").read_text()) if not link.startswith("https://")]
    assert [Path(link).suffix for link in links] == [".svg"]


HOT, COLD = "llama-8b-consumer-2-h100", "llama-8b-cold-h100"
MEASURED = {
    "**`pyint8.load`**": [
        (HOT, "pyint8", "first"),
        (HOT, "pyint8", "later"),
        (COLD, "pyint8 (cold)", "first"),
        (HOT, "pyint8 (process start to ready)", "first"),
        (HOT, "imports (process start to ready)", "first"),
    ],
    "transformers 5.23 `load_in_8bit`": [(HOT, "transformers-int8", "first"), (HOT, "transformers-int8", "later")],
    "best raw loader, safetensors 0.9 `prefetch`": [
        (HOT, "safetensors-prefetch", "first"),
        (HOT, "safetensors-prefetch", "later"),
    ],
}
"""Rows of the README's table of speed: the run, the case and the load of each of its numbers, in order."""


def median_seconds(run: str, case: str, load: str) -> float:
    results = json.loads((ROOT / "benchmarks" / "results" / f"{run}.json").read_text())["checkpoints"]["llama-8b"]
    (line,) = (line for line in results["results"] if line["case"] == case)
    return float(line["summary"][f"{load}_seconds"]["median"])


@in_source_tree
@pytest.mark.parametrize("row", MEASURED)
def test_the_readme_s_speed_is_what_was_measured(row: str) -> None:
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {row} |"))
    said = re.findall(r"(\d+\.(\d+)) s", line)
    measured = [
        f"{median_seconds(*each):.{len(digits)}f}" for each, (_, digits) in zip(MEASURED[row], said, strict=True)
    ]
    assert [number for number, _ in said] == measured


@in_source_tree
def test_experiments_that_the_code_names_are_in_the_lab_book() -> None:
    known = titles(ROOT / "docs" / "performance.md")
    sources = [
        path
        for folder in ("pyint8", "csrc", "tests/cpp", "benchmarks")
        for path in chain.from_iterable((ROOT / folder).rglob(f"*.{end}") for end in ("py", "pyi", "cpp", "hpp", "cu"))
    ]
    text_of = {path: re.sub(r"\s+(?:(?://|#) )?", " ", path.read_text()) for path in sources}
    named = {(path.name, title) for path, text in text_of.items() for title in EXPERIMENT.findall(text)}
    assert named
    assert not [each for each in named if each[1] not in known]


def test_the_version_is_said_once_for_all() -> None:
    assert pyint8.__version__ == metadata.version("pyint8")
