"""Device maps over several GPUs and the CPU, planned from budgets: the same as transformers plans. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import modeling_utils
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.models.transformers.session import LoadSession
from pyint8.placement.device_map import PLANNED_MAPS

# Of the model's number of parameters, which is about its bytes in int8.
BUDGETS: dict[str, dict[int | str, float]] = {
    "all on the first": {0: 4, 1: 4, "cpu": 0},
    "over two": {0: 0.7, 1: 0.9, "cpu": 10},
    "over three": {0: 0.5, 1: 0.5, 2: 0.8, "cpu": 10},
    "and the CPU": {0: 0.4, 1: 0.4, "cpu": 4},
}


class PlannedError(RuntimeError):  # a kind that loads pass on as it is
    """Ends a load once its device map is there."""


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Any]:
    """The planned device map of a load, which goes no further."""
    plan = modeling_utils._get_device_map

    def stop(model: Any, device_map: Any, *rest: Any) -> Any:
        found = plan(model, device_map, *rest)
        if not isinstance(device_map, str):
            return found
        raise PlannedError(found)

    monkeypatch.setattr(modeling_utils, "_get_device_map", stop)
    monkeypatch.setattr(LoadSession, "_start", lambda *_: None)  # there is no GPU to open
    monkeypatch.setattr("pyint8.models.transformers.hooks.check_device_map", lambda _: None)

    def map_of(load: Callable[[], object]) -> Any:
        with pytest.raises(PlannedError) as caught:
            load()
        return caught.value.args[0]

    return map_of


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("plan", PLANNED_MAPS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral", "t5", "bert_mlm", "llava", "qwen2_vl"])
def test_the_same_map(
    name: str, plan: str, budget: str, dtype: torch.dtype, checkpoints: CheckpointStore, planned: Callable[..., Any]
) -> None:
    cls = ZOO[name].cls
    folder: Path = checkpoints.folder(ZOO[name], "bf16")
    parameters = sum(parameter.numel() for parameter in ZOO[name].build().parameters())
    memory = {device: int(share * parameters) for device, share in BUDGETS[budget].items()}
    theirs = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    ours = pyint8.Int8Config(fp32_cpu_offload=True)
    where = {"device_map": plan, "dtype": dtype}
    expected = planned(
        lambda: cls.from_pretrained(folder, quantization_config=theirs, max_memory=dict(memory), **where)  # type: ignore[attr-defined]
    )
    assert expected == planned(lambda: pyint8.load(folder, model=cls, config=ours, max_memory=memory, **where))
    assert expected == planned(
        lambda: cls.from_pretrained(folder, quantization_config=ours, max_memory=dict(memory), **where)  # type: ignore[attr-defined]
    )
    inspected = pyint8.inspect(folder, device_map=plan, max_memory=memory, dtype=dtype, config=ours)
    assert inspected.device_map == {module: str(device) for module, device in expected.items()}
    if name == "llama" and budget.startswith("over"):  # for some, a GPU of this size is too small for anything
        assert len(set(expected.values())) > 1
