"""Which modules' weights are read without calling them, told from source."""

from __future__ import annotations

import inspect
import time
from typing import Any

import calling_modules
import pytest
import reading_modules
import torch
from reading_modules import Base, Functional
from reads import reads
from torch import nn

from pyint8.quantizer.reads import find_reads

# Whose weight each of `reading_modules` reads, where it is not that of `a` alone.
READ = {
    "Joined": {"a", "b"},
    "Indexed": {"bs.0"},
    "Listed": {"bs.0", "bs.1"},
    "Looped": {"bs.0", "bs.1"},
    "Zipped": {"bs.0", "bs.1"},
    "OfTheRoundBefore": {"bs.0", "bs.1"},
    "OfChildren": {"a", "b"},
    "ByPartOfName": {"rel_a", "rel_b"},
    "Mapped": {"layers.q"},
    "MappedLoop": {"layers.q", "layers.k"},
}


def kinds(module: Any) -> list[type[nn.Module]]:
    own = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    return [cls for cls in own if issubclass(cls, Base) and cls is not Base]


@pytest.mark.parametrize("cls", kinds(reading_modules), ids=lambda cls: cls.__name__)
def test_what_is_read_is_found(cls: type[nn.Module]) -> None:
    module = cls()
    assert reads(module).keys() == READ.get(cls.__name__, {"a"})
    assert module(torch.randn(2, 8)).shape[-1] == 8  # it is code that runs


@pytest.mark.parametrize("cls", kinds(calling_modules), ids=lambda cls: cls.__name__)
def test_what_does_no_harm_is_none(cls: type[nn.Module]) -> None:
    assert not reads(cls(), _is_quantized=True)


def test_where_it_is_read_is_told() -> None:
    assert reads(Functional()) == {"a": "Functional.forward"}
    assert reads(reading_modules.ByMethod()) == {"a": "ByMethod._project"}


def test_modules_within_modules_are_known_by_their_names() -> None:
    outer = nn.Sequential(Base(), nn.ModuleList([Functional(), Functional()]))
    assert reads(outer).keys() == {"1.0.a", "1.1.a"}


def test_a_configuration_counts_for_each_module() -> None:
    one, other = calling_modules.NotConfigured(), calling_modules.NotConfigured()
    one.config.pretraining_tp = 2
    assert reads(nn.ModuleList([one, other])).keys() == {"0.b"}


def test_what_is_not_a_fact_counts() -> None:
    assert reads(calling_modules.Quantized()).keys() == {"a"}
    assert reads(calling_modules.InTraining(), training=True).keys() == {"a"}


def test_only_what_is_to_become_int8_counts() -> None:
    module = Functional()
    assert not find_reads(dict(module.named_modules()), [module.b], {}, training=False)


SOURCELESS = """
class Sourceless(Base):
    def forward(self, x):
        return torch.nn.functional.linear(self.b(x), self.a.weight.to(x.dtype))
"""


def test_without_source_the_name_decides() -> None:
    space = {"Base": Base, "torch": torch, "__name__": "nowhere"}
    exec(SOURCELESS, space)  # as from a file that is compiled and gone
    module: Any = nn.ModuleDict({"one": space["Sourceless"](), "other": Base()})
    assert reads(module).keys() == {"one.a"}


def test_code_that_cannot_be_followed_does_not_stop_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RecursionError

    monkeypatch.setattr("pyint8.quantizer.reads.interpreter.Frame.run", fail)
    assert reads(Functional()).keys() == {"a"}


class Endless(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(x, self.a) if x.sum() > 0 else self.forward(x - 1)

    def again(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return self.again(x, self.b) if layer is self.a else torch.nn.functional.linear(x, layer.weight)


def test_functions_that_call_themselves_come_to_an_end() -> None:
    assert reads(Endless()).keys() == {"b"}


def test_a_model_that_reads_nothing_costs_nothing() -> None:
    module = nn.ModuleList(calling_modules.WithSpelled() for _ in range(2000))
    reads(module[:1])
    start = time.perf_counter()
    assert not reads(module)
    assert time.perf_counter() - start < 1
