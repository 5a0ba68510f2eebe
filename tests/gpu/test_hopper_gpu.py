"""Products of int8 experts with many rows on Hopper: beside the kernel for all GPUs, and beside fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import silu

from pyint8.quantizer.experts import hopper
from pyint8.quantizer.experts import linear as plain

kernels: Any = pytest.importorskip("pyint8.quantizer.experts.kernels", exc_type=ImportError)

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == hopper._HOPPER
pytestmark = [
    pytest.mark.skipif(not IS_HOPPER, reason="not a Hopper GPU"),
    pytest.mark.skipif(not hopper.is_tried(), reason="a Triton that the kernel was not tried with"),
]

# Rows of each expert: around those of a tile, and none.
EIGHT = (0, 1, 255, 256, 257, 0, 1300, 512)


def many(experts: int) -> tuple[int, ...]:
    counts = torch.randint(0, 500, (experts,), generator=torch.Generator().manual_seed(experts))
    return tuple(counts.tolist())


class Product(NamedTuple):
    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    ends: torch.Tensor


def product(counts: tuple[int, ...], out: int, inner: int, behind: int = 0) -> Product:
    """Random values, with `behind` rows of no expert."""
    torch.manual_seed(out + inner)
    with torch.device("cuda"):
        return Product(
            torch.randn(sum(counts) + behind, inner, dtype=torch.bfloat16),
            torch.randint(-128, 128, (len(counts), out, inner), dtype=torch.int8),
            torch.rand(len(counts), out) / inner**0.5,
            torch.tensor(counts).cumsum(0).int(),
        )


def assert_right(found: torch.Tensor, given: Product, tokens: torch.Tensor | None, gated: bool) -> None:
    rows = given.x if tokens is None else given.x[tokens.long()]
    expected = plain._one_by_one(rows.double(), *given[1:])
    if gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = silu(gate) * up
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() <= 4e-3 * expected.norm()
    assert (found.double() - expected).abs().max() <= 8e-3 * expected.abs().max()
    assert not found[given.ends[-1] :].any()


def leave_nan(rows: int, columns: int) -> None:
    """In the memory that the next tensor of this size gets."""
    torch.full((rows, columns), torch.nan, dtype=torch.bfloat16, device="cuda")


@pytest.fixture(autouse=True)
def least_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured to be the least may change; these tests have more than 192 rows for an expert, or far fewer."""
    monkeypatch.setattr(hopper, "_LEAST_ROWS", 192)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that went by Hopper's kernel."""
    kernel: Any = hopper._kernel()
    real, rows = kernel.linear, []

    def linear(x: torch.Tensor, *others: torch.Tensor, gated: bool) -> torch.Tensor:
        rows.append(len(x))
        return real(x, *others, gated=gated)

    monkeypatch.setattr(kernel, "linear", linear)
    return rows


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "out", "inner", "behind"),
    [
        (EIGHT, 256, 320, 0),
        (EIGHT, 1024, 64, 1),
        (EIGHT[::-1], 384 * 2, 1024, 300),
        ((400,), 128, 128, 0),
        ((0, 0, 700), 128, 64, 600),
        (many(128), 256, 128, 257),
        (many(256), 256, 192, 0),
    ],
    ids=["eight", "narrow", "behind", "one", "last", "128", "256"],
)
def test_products(counts: tuple[int, ...], out: int, inner: int, behind: int, gated: bool, gathered: bool) -> None:
    given = product(counts, out, inner, behind)
    tokens = torch.randperm(len(given.x), device="cuda").int() if gathered else None
    leave_nan(len(given.x), out // 2 if gated else out)
    found = hopper.linear(*given, tokens=tokens, gated=gated)
    assert found is not None
    assert_right(found, given, tokens, gated)
    other = kernels.linear(*given, tokens=tokens, gated=gated, tiles=kernels._MOST)
    assert (found.float() - other.float()).abs().max() <= 2**-7 * other.float().abs().max()
    assert (found == other).float().mean() > 0.99


def test_many_steps_and_tiles() -> None:
    """More than processors have at once, and stages that come round often."""
    given = product((1500, 900, 0, 2100), 4096, 2048)
    for _ in range(3):
        found = hopper.linear(*given)
        assert found is not None
        assert_right(found, given, None, False)


# --- which way it goes ------------------------------------------------------------------------------------------------


def test_many_rows_go_by_it(asked: list[int]) -> None:
    given = product(EIGHT, 256, 64)
    assert_right(kernels.linear(*given, gated=True), given, None, True)
    assert_right(plain.experts_linear(*given), given, None, False)
    assert asked == [sum(EIGHT)] * 2


OTHERS: dict[str, Callable[[], tuple[Product, dict[str, Any]]]] = {
    "few rows": lambda: (product((100, 0, 60), 256, 64), {}),
    "inner": lambda: (product(EIGHT, 256, 96), {}),
    "columns": lambda: (product(EIGHT, 40, 64), {}),
    "pairs of columns": lambda: (product(EIGHT, 64, 64), {"gated": True}),
    "strides": lambda: (strided(product(EIGHT, 256, 128)), {}),
    "tiles": lambda: (product(EIGHT, 256, 64), {"tiles": kernels._MOST}),
}


def strided(given: Product) -> Product:
    return given._replace(x=given.x[:, :64], codes=given.codes[:, :, :64].contiguous())


@pytest.mark.parametrize("why", OTHERS)
def test_others_go_as_they_did(why: str, asked: list[int]) -> None:
    given, options = OTHERS[why]()
    assert_right(kernels.linear(*given, **options), given, None, options.get("gated", False))
    assert not asked


def test_gradients_go_as_they_did(asked: list[int]) -> None:
    given = product(EIGHT, 256, 64)
    grad = torch.randn(len(given.x), 256, device="cuda", dtype=torch.bfloat16)
    found = kernels.linear_backward(grad, *given[1:])
    expected = plain._one_by_one_backward(grad.double(), *given[1:])
    assert (found.double() - expected).norm() <= 1.2e-2 * expected.norm()
    assert not asked


# --- whole modules ----------------------------------------------------------------------------------------------------


def layer(tokens: int, experts: int = 8, hidden: int = 256, inner: int = 384) -> list[torch.Tensor]:
    """Activations, routes of which some lead nowhere, weights; codes and scales of both layers."""
    up, down = product((tokens,) + (0,) * (experts - 1), 2 * inner, hidden), product((0,) * experts, hidden, inner)
    ids = torch.rand(tokens, experts + 1, device="cuda").topk(2).indices
    return [up.x, ids, torch.rand(tokens, 2, device="cuda").bfloat16(), up.codes, up.scales, down.codes, down.scales]


def test_a_layer(asked: list[int]) -> None:
    x, ids, weights, *codes = layer(2000)
    found = plain.experts_forward(x, ids, weights, *codes)
    assert asked == [4000, 4000]
    expected = plain._forward_one_by_one(x.double(), ids, weights.double(), *codes)
    assert (found.double() - expected).norm() <= 1.2e-2 * expected.norm()


def test_nothing_waits_for_the_device(asked: list[int]) -> None:
    given = layer(2000)
    plain.experts_forward(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain.experts_forward(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(asked) == 4


def test_a_graph_takes_other_routes(asked: list[int]) -> None:
    given = layer(2000)
    others = [given[0].flip(0), torch.rand(2000, 9, device="cuda").square().topk(2).indices % 4, given[2].flip(0)]
    plain.experts_forward(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = plain.experts_forward(*given)
    for mine, other in zip(given, others, strict=False):
        mine.copy_(other)
    for _ in range(2):
        graph.replay()
        assert torch.equal(found, plain.experts_forward(*given))
    assert asked == [4000] * 8
