"""Where a device's tensors go when its driver does not open."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from streams import CPU, TINY

from pyint8.streaming.transport import Transport


def test_a_gpu_without_a_driver_of_ours_is_served_through_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nothing_left: None
) -> None:
    on_host = torch.zeros(1)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: on_host)  # what makes the context, where there is a GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    transport = Transport(replace(TINY, libcuda="libabsent.so"))
    lane = transport.lane(torch.device("cuda"))
    transport.close()
    assert lane.device == CPU
    (record,) = caplog.records
    assert record.getMessage().startswith("tensors for cuda:3 go through pageable host memory, slowly: ")
    assert "libabsent.so" in record.getMessage()
