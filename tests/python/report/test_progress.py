"""When a bar is shown, and by what."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging
from zoo import ZOO, CheckpointStore

from pyint8.report.progress import ByteProgress

Load = Callable[..., Any]


@pytest.fixture(autouse=True)
def bars_on() -> Iterator[None]:
    transformers_logging.enable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


@pytest.fixture
def hooked(checkpoints: CheckpointStore) -> Iterator[list[Any]]:
    """The bars that transformers' factory made of a load, by the hook that it offers."""
    checkpoints.folder(ZOO["llama"], "bf16")  # written before: that has a bar of its own
    made: list[Any] = []

    def hook(factory: Any, arguments: Any, keywords: Any) -> Any:
        made.append((keywords.get("desc"), factory(*arguments, **keywords)))
        return made[-1][1]

    before = transformers_logging.set_tqdm_hook(hook)
    yield made
    transformers_logging.set_tqdm_hook(before)


def shell(kind: str) -> Any:
    return SimpleNamespace(get_ipython=lambda: SimpleNamespace(config={kind: {}}))


def is_shown(asked: bool | None = None) -> bool:
    return ByteProgress(asked).is_shown


def test_a_terminal_or_a_notebook_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_shown()  # pytest captures
    for kind, shown in (("IPKernelApp", True), ("TerminalIPythonApp", False)):
        monkeypatch.setitem(sys.modules, "IPython", shell(kind))
        assert is_shown() is shown
        assert is_shown(True)
        assert not is_shown(False)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("switch", [transformers_logging.disable_progress_bar, disable_progress_bars])
def test_the_switches_of_others_count(switch: Callable[[], None]) -> None:
    assert is_shown()
    switch()
    assert not is_shown()
    assert is_shown(True)  # asked for
    enable_progress_bars()
    transformers_logging.enable_progress_bar()
    assert is_shown()


@pytest.mark.usefixtures("terminal")
def test_the_bar_is_of_transformers_own_making_and_the_only_one(load: Load, hooked: list[Any]) -> None:
    _, report = load(return_report=True)
    ((name, bar), *others) = hooked
    assert name == "Loading int8"
    assert [type(other) for _, other in others] == [transformers_logging.EmptyTqdm] * len(others)
    assert (bar.n, bar.total) == (report.checkpoint_bytes, report.checkpoint_bytes)
    assert transformers_logging.is_progress_bar_enabled()


def test_it_can_be_had_where_bars_are_switched_off(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    transformers_logging.disable_progress_bar()
    load(progress=True)
    assert "Loading int8: 100%" in capsys.readouterr().err
    assert not transformers_logging.is_progress_bar_enabled()
