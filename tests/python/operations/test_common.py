"""What several operations do alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from pyint8.operations.common import warn_of_own_values
from pyint8.report import LoadReport

if TYPE_CHECKING:
    from pyint8.streaming.ranks.ranks import Ranks


def test_weights_that_each_rank_has_for_itself_are_named(caplog: pytest.LogCaptureFixture) -> None:
    lacking = LoadReport(loading_info={"missing_keys": {"score.weight", "score.bias"}})
    warn_of_own_values(None, lacking)
    warn_of_own_values(cast("Ranks", object()), LoadReport(loading_info={"missing_keys": set()}))
    assert not caplog.messages
    warn_of_own_values(cast("Ranks", object()), lacking)
    (line,) = caplog.messages
    assert "each rank has its own values of score.bias, score.weight: broadcast them" in line
