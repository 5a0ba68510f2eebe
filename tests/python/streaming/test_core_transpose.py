"""Conv1D weights transposed by the extension on the CPU: bit for bit what torch's own casts and transposition give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyint8 import _core

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def transposed_by_torch(source: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
    return source.to(model_dtype).to(torch.float16).T.contiguous()


def transposed(engine: _core.Engine, source: torch.Tensor, model_dtype: torch.dtype, padding: int = 0) -> torch.Tensor:
    rows, columns = source.shape
    target = torch.full((columns, rows + padding), 7, dtype=torch.float16)
    through_bfloat16 = model_dtype == torch.bfloat16
    name, stride = NAMES[source.dtype], rows + padding
    engine.transpose_to_half(
        0, source.data_ptr(), name, through_bfloat16, rows, columns, target.data_ptr(), stride, stream=0
    )
    assert bool((target[:, rows:] == 7).all())
    return target[:, :rows].contiguous()


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; where both are NaN, any NaN will do."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.int32 if dtype == torch.float32 else np.int16)).view(dtype)


dtypes = st.sampled_from(list(NAMES))


@pytest.fixture(scope="module")
def engine() -> _core.Engine:
    made = _core.Engine(threads=1, slots_per_thread=1, slot_bytes=8192, direct_io=False)
    made.add_host_device(threads=3)
    return made


@settings(max_examples=200, deadline=None)
@given(dtype=dtypes, model_dtype=dtypes, shape=st.tuples(*[st.integers(0, 150)] * 2), seed=st.integers(0, 2**32 - 1))
def test_transposed_as_by_torch_any_bits(engine, dtype, model_dtype, shape, seed) -> None:
    # Exponents as they come: most fp32 overflow fp16 or vanish, a few are subnormal, NaN or infinite.
    source = from_bits(np.random.default_rng(seed).integers(-(2**31), 2**31, shape), dtype)
    assert_same(transposed(engine, source, model_dtype, padding=seed % 3), transposed_by_torch(source, model_dtype))


@pytest.mark.parametrize("model_dtype", NAMES)
@pytest.mark.parametrize("dtype", NAMES)
def test_transposed_as_by_torch_every_pattern(engine, dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """All of 16 bits; for fp32, all whose upper 16 bits may be anything and whose lower ones decide the rounding."""
    patterns = np.arange(2**16).reshape(256, 256)
    if dtype == torch.float32:
        lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
        patterns = np.concatenate([(patterns << 16) + bits for bits in lower])
    source = from_bits(patterns, dtype)
    assert_same(transposed(engine, source, model_dtype), transposed_by_torch(source, model_dtype))


def test_transposed_as_by_torch_where_subnormals_are_flushed(engine) -> None:
    source = from_bits(np.arange(2**16).reshape(256, 256), torch.float16)
    assert torch.set_flush_denormal(True)
    try:
        got, expected = transposed(engine, source, torch.bfloat16), transposed_by_torch(source, torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, expected)


def test_a_large_weight_is_shared_by_threads(engine) -> None:
    source = torch.randn(1500, 2003, generator=torch.Generator().manual_seed(0))
    assert_same(transposed(engine, source, torch.float16), transposed_by_torch(source, torch.float16))
