"""What the command line says of a real device: what a model takes there, what the doctor finds, what is measured."""

from __future__ import annotations

from pathlib import Path

import torch
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.operations.bench import bench
from pyint8.operations.doctor import examine


def test_a_model_goes_where_inspect_said(checkpoints: CheckpointStore) -> None:
    source = checkpoints.folder(ZOO["llama"], "bf16")
    found, model = pyint8.inspect(source), pyint8.load(source)
    assert found.fits
    if torch.cuda.device_count() > 1:
        assert found.device_map == {name: str(device) for name, device in model.hf_device_map.items()}
    else:  # of one, neither accelerate nor transformers makes a map
        assert {str(device) for device in found.device_map.values()} == {str(model.device)}
    tensors = [*model.parameters(), *model.buffers()]
    scales = [parameter.SCB for parameter in model.parameters() if hasattr(parameter, "SCB")]
    assert sum(found.device_bytes.values()) == sum(tensor.nbytes for tensor in [*tensors, *scales])


def test_the_doctor_knows_this_machine() -> None:
    findings = {finding.name: finding for finding in examine()}
    assert not [finding for finding in findings.values() if finding.state == "broken"]
    assert findings["torch at work"].facts["gpus"] == torch.cuda.device_count()
    buses = [finding for name, finding in findings.items() if name.startswith("bus of")]
    assert len(buses) == torch.cuda.device_count()
    assert all(bus.facts["gigabytes_per_second"] > 1 for bus in buses)


def test_the_engine_is_measured_beside_the_bus(tmp_path: Path) -> None:
    speeds = {speed.name: speed.gigabytes_per_second or 0.0 for speed in bench(tmp_path)}
    assert speeds["bus"] > 1
    assert 0.2 < speeds["engine"] < 1.2 * speeds["bus"]
    assert 0.2 < speeds["load"] < 1.2 * speeds["bus"]
