"""What several operations do alike."""

from __future__ import annotations

import pytest

from pyint8.operations.common import warn_of_own_values
from pyint8.report import LoadReport


def test_weights_that_each_rank_has_for_itself_are_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_own_values(LoadReport(loading_info={"missing_keys": set()}))
    warn_of_own_values(LoadReport(loading_info={"missing_keys": {"score.weight", "score.bias"}}))
    (line,) = caplog.messages
    assert "each rank has its own values of score.bias, score.weight: broadcast them" in line
