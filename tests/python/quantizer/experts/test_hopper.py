"""Which products of int8 experts go by Hopper's kernel, and what happens where it cannot be had; no GPU, no Triton."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyint8.quantizer.experts import hopper

KERNEL = "pyint8.quantizer.experts.hopper_kernel"
EXPERTS = 2
ROWS = hopper._LEAST_ROWS * EXPERTS + 1


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(hopper, "_has_failed", False)


def product(rows: int = ROWS, experts: int = EXPERTS, out: int = 128, inner: int = 64) -> list[torch.Tensor]:
    """Activations, codes and scales, without values."""
    with torch.device("meta"):
        x = torch.empty(rows, inner, dtype=torch.bfloat16)
        return [x, torch.empty(experts, out, inner, dtype=torch.int8), torch.empty(experts, out)]


def usable(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, gated: bool = False) -> bool:
    return hopper.is_usable(x, codes, scales, len(x), gated)


# --- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("out", "inner"), [(128, 64), (28672, 4096), (4096, 14336), (4096, 7168)])
def test_products_that_it_takes(out: int, inner: int, gated: bool) -> None:
    assert usable(*product(out=out, inner=inner), gated=gated)


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": ROWS - 1},
        {"experts": EXPERTS + 1},
        {"inner": 96},
        {"out": 40},
        {"out": 192},
        {"out": 2**31 // EXPERTS},
        {"experts": 0},
        {"out": 0},
        {"inner": 0},  # it would wait for the first of no steps
    ],
    ids=str,
)
def test_shapes_that_it_does_not_take(shape: dict[str, int]) -> None:
    assert not usable(*product(**shape))


def test_a_tile_of_pairs_is_half_as_wide() -> None:
    assert usable(*product(out=3 * 128), gated=True)
    assert not usable(*product(out=3 * 64), gated=True)


@pytest.mark.parametrize(
    "changed",
    [
        lambda x, codes, scales: (x.half(), codes, scales),
        lambda x, codes, scales: (x.float(), codes, scales),
        lambda x, codes, scales: (x, codes, scales.half()),
        lambda x, codes, scales: (x, codes.float(), scales),
        lambda x, codes, scales: (torch.cat([x, x], 1)[:, :64], codes, scales),
        lambda x, codes, scales: (x, codes.mT.contiguous().mT, scales),
        lambda x, codes, scales: (x, codes, torch.cat([scales, scales], 1)[:, :128]),
    ],
)
def test_tensors_that_it_does_not_take(changed: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    assert not usable(*changed(*product()))


def test_activations_at_an_odd_place() -> None:
    x, codes, scales = (torch.empty(each.shape, dtype=each.dtype) for each in product())
    assert usable(x, codes, scales)
    assert not usable(torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape), codes, scales)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert not usable(*product())


def test_amd_counts_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not usable(*product())


# --- whether it can be had --------------------------------------------------------------------------------------------


def found(monkeypatch: pytest.MonkeyPatch, triton: Any, kernel: Any) -> Any:
    """The kernel's module; None in the place of a module is one that cannot be imported."""
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, KERNEL, kernel)
    return hopper._kernel.__wrapped__()


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git1234", "3.7.1", "3.9.2", "3.9.0.post1"])
def test_versions_that_it_was_tried_with(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace()
    assert found(monkeypatch, SimpleNamespace(__version__=version), kernel) is kernel


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.10.0", "4.0.0", "nightly"])
def test_other_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, SimpleNamespace(__version__=version), SimpleNamespace()) is None


def test_without_triton_it_is_not_missed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert found(monkeypatch, None, SimpleNamespace()) is None
    assert found(monkeypatch, SimpleNamespace(), SimpleNamespace()) is None
    assert not caplog.records


def test_a_triton_that_lacks_something_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert found(monkeypatch, SimpleNamespace(__version__="3.6.0"), None) is None
    assert hopper.is_tried()
    (record,) = caplog.records
    assert (record.name, record.levelname) == (hopper.__name__, "WARNING")
    assert KERNEL in record.getMessage()


def test_other_gpus_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    for index in (0, 1):
        with FakeTensorMode():
            x = torch.empty(ROWS, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        monkeypatch.setattr(x, "data_ptr", lambda: 0, raising=False)
        assert usable(x, *product()[1:]) == (index == 0)


# --- when it is asked for ---------------------------------------------------------------------------------------------


class Kernel:
    """In the place of the module: what it was called with, and what it raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.calls: list[torch.Tensor] = []
        self.error = error
        monkeypatch.setattr(hopper, "_kernel", lambda: self)

    def linear(self, x: torch.Tensor, *others: torch.Tensor, gated: bool) -> torch.Tensor:
        self.calls.append(x)
        if self.error is not None:
            raise self.error
        return x.new_ones(1)


ENDS = torch.zeros(EXPERTS, dtype=torch.int32)


def test_rows_are_gathered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    _, codes, scales = product()
    x = torch.arange(8, dtype=torch.bfloat16).view(8, 1).expand(8, 64).contiguous()
    tokens = torch.arange(ROWS, dtype=torch.int32) % 8
    assert hopper.linear(x, codes, scales, ENDS, tokens=tokens) is not None
    assert torch.equal(kernel.calls[0], x[tokens.long()])
    assert hopper.linear(x, codes, scales, ENDS, tokens=tokens[1:]) is None
    assert len(kernel.calls) == 1


def test_where_it_fails_it_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel(monkeypatch, AttributeError("no such instruction"))
    for _ in range(3):
        assert hopper.linear(*product(), ENDS) is None
    assert len(kernel.calls) == 1
    (record,) = caplog.records
    assert (record.name, record.levelname) == (hopper.__name__, "WARNING")
    assert "no such instruction" in record.getMessage()


def test_too_little_memory_is_no_failure_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel(monkeypatch, torch.OutOfMemoryError("too little"))
    with pytest.raises(torch.OutOfMemoryError):
        hopper.linear(*product(), ENDS)
    kernel.error = None
    assert hopper.linear(*product(), ENDS) is not None
    assert not caplog.records


def test_without_it_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_kernel", lambda: None)
    assert hopper.linear(*product(), ENDS) is None
