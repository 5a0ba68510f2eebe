"""The identity matrix of tests/contract, on the GPU: bitsandbytes' CUDA kernels, our stream and our kernel."""

from __future__ import annotations

import pytest
from test_identity import (  # noqa: F401  (collected here)
    scratch,
    test_class_is_found_in_the_config,
    test_fresh_head_reads_back,
    test_identity,
    test_placement_left_to_the_loader,
)


@pytest.fixture
def device_map() -> dict[str, int]:
    return {"": 0}
