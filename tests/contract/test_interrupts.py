"""Ctrl-C at any line of the package, or of what changes the process for a while in transformers and torch.

Nothing is left, everything is as it was, and the next load is right. Real signals, sent where a line begins, one a
load. A sample of the lines runs always; all of them with PYINT8_TEST_EVERY_LINE=1, which takes long.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.autograd.grad_mode
import torch.overrides
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.overrides import _get_current_function_mode
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8.models.transformers import left_as_found
from pyint8.models.transformers.session import LoadSession
from pyint8.report.recorder import _listeners

PACKAGE = str(Path(pyint8.__file__).parent)
EVERY_LINE = os.environ.get("PYINT8_TEST_EVERY_LINE") == "1"
SAMPLE = 25
Line = tuple[str, int]
Road = Callable[[], dict[str, torch.Tensor]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:unclosed file"),  # one that is interrupted while it is being opened
]


def plain(path: Path) -> dict[str, torch.Tensor]:
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    config = pyint8.Int8Config(skip_modules=[])
    return dict(pyint8.load(path, "cpu", model=module, config=config).state_dict())


def taken_over(folder: Path) -> dict[str, torch.Tensor]:
    int8 = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pyint8.takeover():
        model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=int8, device_map="cpu")
    return dict(model.state_dict())


@pytest.fixture(params=["safetensors", "bin", "old bin", "transformers", "takeover"])
def road(request: pytest.FixtureRequest, tmp_path: Path, checkpoints: CheckpointStore) -> Road:
    """Loads something, and gives its tensors."""
    if request.param == "transformers":
        folder = checkpoints.folder(ZOO["llama"], "bf16")
        return lambda: dict(pyint8.load(folder, "cpu").state_dict())
    if request.param == "takeover":
        folder = checkpoints.folder(ZOO["llama"], "bf16")
        return lambda: taken_over(folder)
    values = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).state_dict()
    if request.param == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(values, path)
    else:
        path = tmp_path / "w.bin"
        torch.save(values, path, _use_new_zipfile_serialization=request.param == "bin")
    return lambda: plain(path)


@contextmanager
def traced(trace: Callable[[FrameType, str, Any], Any]) -> Iterator[None]:
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def lines_of(action: Callable[[], object]) -> list[Line]:
    """The lines of the package that it runs in this thread, in the order in which they are reached."""
    seen: dict[Line, None] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen[frame.f_code.co_filename, frame.f_lineno] = None
        return trace

    with traced(trace):
        action()
    return list(seen)


def interrupted_at(line: Line, action: Callable[[], object]) -> bool:
    """Whether Ctrl-C, when it comes to a line, ends the action."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != line[0]:
            return trace if frame.f_code.co_filename.startswith(PACKAGE) else None
        if event == "line" and frame.f_lineno == line[1]:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    try:
        with traced(trace):
            action()
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def heard(line: Line) -> Iterator[None]:
    """Python says of an error in a finalizer that it is ignored, which pytest would take for a failure."""
    hook = sys.unraisablehook
    if is_in_finalizer(line):
        sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def state() -> dict[str, object]:
    """What a load that is interrupted must leave as it was."""
    paths = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return {
        "collector": gc.isenabled(),
        "frozen": gc.get_freeze_count() > 0,
        "open files": sorted(os.readlink(path) for path in paths if os.path.exists(path)),
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name != "tqdm_monitor"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "replaced": [torch.linspace, torch.nn.init.ones_, PreTrainedModel.init_weights, PreTrainedModel.tie_weights],
        "pinned": pyint8._core.pinned_bytes_in_use(),
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "session": LoadSession.active(),
        "function mode": _get_current_function_mode(),
        "quantizer": AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"],
        "listeners": len(_listeners),
    }


def is_in_finalizer(line: Line) -> bool:
    """Python swallows what is raised there."""
    text = Path(line[0]).read_text().splitlines()[: line[1]]
    return (
        next((each for each in reversed(text) if each.strip().startswith("def ")), "").strip().startswith("def __del")
    )


def test_nothing_is_left(road: Road) -> None:
    expected = road()
    lines = lines_of(road)
    gc.collect()  # what other tests left, open fonts of pictures among it
    before, left = state(), []
    for line in lines if EVERY_LINE else random.Random(0).sample(lines, SAMPLE):
        with heard(line):
            was_interrupted = interrupted_at(line, road)
        gc.collect()  # a from_pretrained that fails leaves a model that is a cycle
        after = state()
        if after != before or not (was_interrupted or is_in_finalizer(line)):
            left.append((line, was_interrupted, {name: after[name] for name in after if after[name] != before[name]}))
            gc.enable()
            before = state()
    assert not left, "\n" + "\n".join(map(str, left))
    again = road()
    assert again.keys() == expected.keys()
    for name, value in again.items():
        assert torch.equal(value, expected[name]), name


# What enters and leaves context managers, in any library, and those of transformers and torch.
MANAGERS = {
    *(str(module.__file__) for module in (contextlib, torch.autograd.grad_mode, torch.overrides)),
    *(str(Path(transformers.__file__).parent / name) for name in ("initialization.py", "monkey_patching.py")),
}
OTHER_MANAGERS = {"local_torch_dtype", "set_quantized_state"}
# Its line with a lock comes once more when the block is left, with the lock held: a trace can interrupt there, a signal
# cannot.
NOT_INTERRUPTED = "get_patch_mapping"
Moment = tuple[str, int, str, str]


def moments_of(action: Callable[[], object], interrupted: Moment | None = None) -> list[Moment]:
    """The lines of context managers that it runs in this thread, each once for each that calls them; first those that
    come first while torch's default dtype is changed."""
    seen: dict[Moment, bool] = {}
    usual = torch.get_default_dtype()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        is_manager = code.co_filename in MANAGERS or code.co_name in OTHER_MANAGERS
        if not is_manager or code.co_name == NOT_INTERRUPTED:
            return None
        if event == "line":
            caller = frame.f_back
            beyond = caller and caller.f_back
            moment = (
                code.co_filename,
                frame.f_lineno,
                caller.f_code.co_name if caller else "",
                beyond.f_code.co_name if beyond else "",
            )
            if moment == interrupted:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
            seen.setdefault(moment, torch.get_default_dtype() is usual)
        return trace

    with traced(trace):
        action()
    return sorted(seen, key=lambda moment: seen[moment])


def test_what_transformers_changes_is_put_back(checkpoints: CheckpointStore) -> None:
    """It does so itself by context managers, in most lines of which Ctrl-C would leave things changed."""
    folder = checkpoints.folder(ZOO["llama"], "bf16")

    def road() -> dict[str, torch.Tensor]:
        return dict(pyint8.load(folder, "cpu").state_dict())

    expected = road()
    moments = moments_of(road)
    gc.collect()
    before, left = state(), []
    chance = random.Random(0)
    some = chance.sample(moments[: len(moments) // 4], SAMPLE) + chance.sample(moments, SAMPLE)
    for moment in moments if EVERY_LINE else some:
        with contextlib.suppress(KeyboardInterrupt):
            moments_of(road, moment)
            pytest.fail(f"{moment} was not interrupted")
        gc.collect()
        after = state()
        if after != before:
            left.append((moment, {name: after[name] for name in after if after[name] != before[name]}))
            before = after
    assert not left, "\n" + "\n".join(map(str, left))
    again = road()
    for name, value in expected.items():
        assert torch.equal(again[name], value), name


def test_an_error_is_not_taken_for_a_ctrl_c_that_was_caught_before(
    tmp_path: Path, checkpoints: CheckpointStore
) -> None:
    shutil.copy(checkpoints.folder(ZOO["llama"], "bf16") / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{")
    before = torch.get_default_device()
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(pyint8.errors.ModelNotSupportedError, match="configuration"):
            pyint8.load(tmp_path, "cpu")
        assert before == torch.get_default_device()  # `before` is still here


def test_a_second_ctrl_c_while_things_are_put_back(
    checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, times = state(), iter([KeyboardInterrupt])
    build, put_back = transformers.LlamaForCausalLM.__init__, left_as_found._Found.put_back

    def interrupted(self: Any, *args: Any) -> None:
        build(self, *args)
        torch.device("meta").__enter__()
        raise KeyboardInterrupt

    def again(self: Any) -> None:
        for second in times:
            raise second
        put_back(self)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", interrupted)
    monkeypatch.setattr(left_as_found._Found, "put_back", again)
    with pytest.raises(KeyboardInterrupt):
        pyint8.load(checkpoints.folder(ZOO["llama"], "bf16"), "cpu")
    gc.collect()
    assert state() == before
