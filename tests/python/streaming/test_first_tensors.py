"""With which tensors a load begins, where the GPU is one of the mind: only the decision is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyint8 import StreamOptions
from pyint8.checkpoint import Checkpoint, open_checkpoint
from pyint8.streaming import first_tensors
from pyint8.streaming.guesses import Guess
from pyint8.streaming.head_start import FirstTensors

TENSORS = ["h.10.weight", "h.9.weight", "a.weight", "h.9.bias"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file({name: torch.zeros(100, 10, dtype=torch.bfloat16) for name in TENSORS}, tmp_path / "x.safetensors")
    return open_checkpoint(tmp_path / "x.safetensors")


def told(part: FirstTensors) -> dict[str, Any]:
    memory = {"reserved": part.reserved, "if_free": part.if_free}
    found = {"device": str(part.device), "names": [entry.name for entry in part.entries], "nbytes": part.nbytes}
    return found | {name: nbytes for name, nbytes in memory.items() if nbytes}


@pytest.fixture
def begun(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls `begin` on a machine of so many GPUs; returns what the head start was given, or None."""

    def begin(
        device_map: Any, gpus: int = 1, max_memory: Any = None, guess: Guess | None = None
    ) -> dict[str, Any] | None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

        def head_start(devices: Sequence[torch.device], _: Any, *, gpus: int, ranks: None) -> Any:
            is_bounded = max_memory is not None
            parts = first_tensors.first_tensors(checkpoint, device_map, is_bounded=is_bounded, guess=guess)
            assert [part.device for part in parts] in (devices, [])
            made = [told(part) | {"gpus": gpus} for part in parts or map(FirstTensors, devices)]
            return made[0] if len(made) == 1 else made

        monkeypatch.setattr(first_tensors, "HeadStart", head_start)
        is_bounded = max_memory is not None
        return first_tensors.open_head_start(device_map, StreamOptions(), is_bounded=is_bounded)  # type: ignore[return-value]

    return begin


IN_ORDER = ["a.weight", "h.9.bias", "h.9.weight", "h.10.weight"]
ALL = {
    "gpus": 1,
    "names": IN_ORDER,
    "nbytes": 3000,
    "reserved": 4000,
}  # 4000 elements: as many bytes at least
NOTHING: dict[str, Any] = {"names": [], "nbytes": 0}


@pytest.mark.parametrize(
    "device_map", [0, "cuda", "cuda:0", torch.device("cuda"), {"": 0}, {"": "cuda:0"}, None], ids=str
)
def test_one_gpu_that_takes_all_gets_the_first_tensors(begun: Any, device_map: Any) -> None:
    assert begun(device_map) == {"device": "cuda:0", **ALL}
    assert begun(device_map, gpus=2) == {"device": "cuda:0", **ALL}


def test_a_process_of_torchrun_has_its_own(begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert begun("cuda", gpus=2) == {"device": "cuda:1", **ALL}
    assert begun("cuda:0", gpus=2) == {"device": "cuda:0", **ALL}
    assert begun(None, gpus=2) == {"device": "cuda:0", **ALL}


def test_no_map_means_where_torch_makes_tensors(begun: Any) -> None:
    with torch.device("cuda:1"):
        assert begun(None, gpus=2) == {"device": "cuda:1", **ALL}


def test_another_gpu_than_the_first(begun: Any) -> None:
    assert begun({"": 1}, gpus=2)["device"] == "cuda:1"
    assert begun({"a": "cuda:1", "h": 1}, gpus=2) == {"device": "cuda:1", **NOTHING, "gpus": 2}


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_planned_map_gets_them_if_there_is_plenty_of_room(begun: Any, device_map: str) -> None:
    # Twice the checkpoint's 8000 bytes and the first tensors' 3000 must fit in 0.8 of what is free.
    assert begun(device_map) == {"device": "cuda:0", **ALL, "if_free": 23750}
    assert begun(device_map, max_memory={0: 10**9}) == {"device": "cuda:0", **NOTHING, "gpus": 1}


def test_an_even_map_begins_everywhere_with_what_is_likely_there(begun: Any) -> None:
    parts = begun("balanced", gpus=2)
    assert [part["device"] for part in parts] == ["cuda:0", "cuda:1"]
    # a.weight is outside of layers, so it stays in 16 bits: 2000 bytes. h.9 has two matrices, 2000 bytes in int8, h.10
    # one. The first GPU's limit is 0.9 * (5000 / 2 + 1.25 * 2000) = 4500 less the largest that is still to come.
    assert [part["names"] for part in parts] == [["h.9.bias", "h.9.weight"], ["h.10.weight", "a.weight"]]
    # 0.8 of what it holds at least, and room for the largest weight of 1000 elements.
    assert [(part["nbytes"], part["reserved"]) for part in parts] == [(600, 2000)] * 2
    assert [(part["if_free"], part["gpus"]) for part in parts] == [(11875, 2)] * 2
    for uneven in ("sequential", "balanced_low_0"):
        assert begun(uneven, gpus=4) == {"device": "cuda:0", **NOTHING, "gpus": 4}


@pytest.mark.parametrize(
    ("guess", "if_free"), [(Guess(True, torch.bfloat16, is_16_bit=True), 9600), (Guess(True, torch.bfloat16), 11875)]
)
def test_an_even_map_needs_room_for_what_is_known_of_the_model(begun: Any, guess: Guess, if_free: int) -> None:
    # In 16 bit: 8000 / 2 and 1.25 * 4000 for the largest layer if nothing is int8, beside the first tensors' 600. That
    # is more than half of (8000 + 3000) / 0.8. Else 16000 may become of the 8000, which takes (16000 + 3000) / 0.8.
    assert [part["if_free"] for part in begun("balanced", gpus=2, guess=guess)] == [if_free] * 2


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (torch.bfloat16, 8000),
        (torch.float32, 16_000),  # as stored: a part may be kept so
        (torch.float8_e4m3fn, 8000),  # as 16 bit
        (torch.int8, 8000),
    ],
    ids=str,
)
def test_a_planned_map_counts_weights_in_16_bit(
    dtype: torch.dtype, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    save_file({name: torch.zeros(100, 10).to(dtype) for name in TENSORS}, tmp_path / "x.safetensors")
    found = open_checkpoint(tmp_path / "x.safetensors")
    guess = Guess(are_int8=True, is_16_bit=True)
    for device_map, if_free in (("auto", int((most + 3000) / 0.8)), (0, 0)):
        (part,) = first_tensors.first_tensors(found, device_map, is_bounded=False, guess=guess)
        assert (part.nbytes, part.if_free) == (3000, if_free)
    (part,) = first_tensors.first_tensors(found, "auto", is_bounded=False, guess=guess._replace(is_16_bit=False))
    assert part.if_free == int((2 * found.nbytes + 3000) / 0.8)


@pytest.mark.parametrize("device_map", [{"a": 0, "h": "cpu"}, {"a": 0, "h": "disk"}, {"a": 0, "h": 1}], ids=str)
def test_a_map_of_several_devices_gets_none(begun: Any, device_map: Any) -> None:
    assert begun(device_map, gpus=2) == {"device": "cuda:0", **NOTHING, "gpus": 2}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"a": "cpu", "h": "disk"}, "meta"], ids=str)
def test_no_gpu_no_head_start(begun: Any, device_map: Any) -> None:
    assert begun(device_map) is None
    assert begun("auto", gpus=0) is None


def test_experts_are_left_to_the_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    names = [
        f"h.{layer}.mlp.experts.{number}.{name}.weight"
        for layer in "01"
        for number in "01"
        for name in ("w1", "w3", "w2")
    ]
    tensors = {name: torch.zeros(100, 10, dtype=torch.bfloat16) for name in [*TENSORS, *names]}
    save_file(tensors, tmp_path / "x.safetensors")
    found = open_checkpoint(tmp_path / "x.safetensors")
    guess = Guess(are_int8=True, quantizer=1)
    (part,) = first_tensors.first_tensors(found, 0, is_bounded=False, guess=guess)
    assert told(part) == {"device": "cuda:0", "names": IN_ORDER, "nbytes": 3000, "reserved": 20_800}
    assert part.guess is not None
    assert [request.entry.name for request in part.guess().requests] == sorted(names[:6], key=lambda name: "w2" in name)
    assert part.otherwise is not None
    other = part.otherwise()
    assert (len(other.entries), other.nbytes, other.reserved, other.guess) == (16, 15_000, 16_000, None)
    (planned,) = first_tensors.first_tensors(found, "auto", is_bounded=False, guess=guess)
    assert planned.if_free == int((2 * 32_000 + 3000 + 8400) / 0.8)
    (planned,) = first_tensors.first_tensors(found, "auto", is_bounded=False, guess=guess._replace(is_16_bit=True))
    assert planned.otherwise is not None
    assert planned.if_free == int((32_000 + 3000 + 8400) / 0.8)
    assert planned.otherwise().if_free == int((32_000 + 15_000) / 0.8)
    assert first_tensors.first_tensors(found, "auto", is_bounded=True, guess=guess) == []
