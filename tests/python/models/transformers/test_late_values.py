"""Parameters are handed out before their values have come; whoever looks at them must find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.streaming.stream import TensorStream


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done after the last parameter was set."""
    found: list[str] = []

    def noted(cls: type, name: str) -> None:
        original = getattr(cls, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, name, note)

    noted(TensorStream, "finish")
    noted(tf.PreTrainedModel, "_finalize_model_loading")
    return found


@pytest.mark.parametrize(
    ("name", "why"),
    [("llama_tied", "tied"), ("bert_mlm", "tied, with a bias"), ("bert_fresh_head", "a part is missing")],
)
def test_they_have_come_before_transformers_looks(
    checkpoints: CheckpointStore, order: list[str], name: str, why: str
) -> None:
    pyint8.load(checkpoints.folder(ZOO[name], "bf16"), "cpu", model=ZOO[name].cls)
    assert order[:2] == ["finish", "_finalize_model_loading"], why


def test_where_nobody_looks_they_come_meanwhile(checkpoints: CheckpointStore, order: list[str]) -> None:
    pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu")
    assert order == ["_finalize_model_loading", "finish"]


def test_a_models_own_code_may_look(checkpoints: CheckpointStore, order: list[str]) -> None:
    class Own(tf.LlamaForCausalLM):
        pass

    pyint8.load(Path(checkpoints.folder(ZOO["llama"], "bf16")), "cpu", model=Own)
    assert order[:2] == ["finish", "_finalize_model_loading"]
