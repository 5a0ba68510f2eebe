"""TensorStream over real files on the CPU: what arrives is what lies in the file, and nothing stays behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import CPU, MIB, MIXED, TINY, bytes_of, joined, requests, stored, unstamped, write

from pyint8 import StreamOptions
from pyint8.checkpoint import DTYPES, Checkpoint, open_checkpoint
from pyint8.errors import CancelledError, CheckpointError, DeviceError, ReadError, TruncatedError
from pyint8.report import Recorder
from pyint8.streaming.extension import _core
from pyint8.streaming.lane import Lane, open_lane
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.source import StreamSource
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("direct_io", [False, True])
def test_whole_tensors_in_order(mixed: Checkpoint, direct_io: bool) -> None:
    recorder = Recorder()
    options = StreamOptions(threads=2, slot_bytes=8192, host_scratch=MIB, direct_io=direct_io)
    with open_stream(requests(mixed), options, recorder=recorder) as stream:
        for name, entry in mixed.items():
            tensor = stream.whole(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.torch_dtype, entry.torch_shape)
            assert bytes_of(tensor) == stored(entry)
    assert recorder.report.checkpoint_bytes == recorder.report.engine["bytes_delivered"] == mixed.nbytes


def test_bands_are_consecutive_rows(mixed: Checkpoint) -> None:
    with open_stream(requests(mixed, in_bands=True), TINY) as stream:
        for name in ("large", "vector", "wide", "odd"):
            entry, at, raw = mixed[name], 0, b""
            for row, band in stream.bands(name):
                assert row == at
                assert band.dtype == entry.torch_dtype
                assert band.shape[1:] == entry.shape[1:]
                assert len(band) == 1 or band.nbytes <= MIB // 8
                at, raw = at + len(band), raw + bytes_of(band)
            assert at == entry.shape[0]
            assert raw == stored(entry)


@pytest.mark.parametrize("name", MIXED)
def test_a_tensor_asked_for_in_bands_can_be_had_whole(mixed: Checkpoint, name: str) -> None:
    with open_stream([TensorRequest(mixed[name], CPU, in_bands=True)], TINY) as stream:
        tensor = stream.whole(name)
    assert tuple(tensor.shape) == mixed[name].shape
    assert bytes_of(tensor) == stored(mixed[name])


@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("name", ["scalar", "empty", "flat"])
def test_what_has_no_rows_comes_as_one_band(mixed: Checkpoint, name: str, in_bands: bool) -> None:
    with open_stream([TensorRequest(mixed[name], CPU, in_bands)], TINY) as stream:
        ((row, band),) = stream.bands(name)
        assert row == 0
        assert tuple(band.shape) == mixed[name].shape
        assert bytes_of(band) == stored(mixed[name])


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_any_part_any_form(mixed: Checkpoint, data: st.DataObject) -> None:
    names = data.draw(st.permutations(list(mixed)))
    banded = data.draw(st.sets(st.sampled_from(names)))
    taken = data.draw(st.permutations(names))[: data.draw(st.integers(0, len(names)))]
    asked = [TensorRequest(mixed[name], CPU, name in banded and mixed[name].shape != ()) for name in names]
    with open_stream(asked, TINY) as stream:
        for name in taken:
            raw = joined(list_of_bands(stream, name)) if name in banded else bytes_of(stream.whole(name))
            assert raw == stored(mixed[name])


def list_of_bands(stream: TensorStream, name: str) -> list[tuple[int, torch.Tensor]]:
    return [(row, band.clone()) for row, band in stream.bands(name)]  # a band is valid until the next


def test_every_dtype_of_torch(tmp_path: Path) -> None:
    known = [name for name, (_, torch_name) in DTYPES.items() if torch_name is not None]
    checkpoint = write(tmp_path / "x", {name: (name, (3, 4)) for name in known})
    with open_stream(requests(checkpoint), TINY) as stream:
        for name in known:
            tensor = stream.whole(name)
            assert tensor.dtype == getattr(torch, str(DTYPES[name][1]))
            assert tuple(tensor.shape) == ((3, 2) if name == "F4" else (3, 4))
            assert bytes(tensor.untyped_storage()) == stored(checkpoint[name])


def test_a_dtype_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x", {"fine": ("F32", (2,)), "six": ("F6_E2M3", (4, 2))})
    with open_stream(requests(checkpoint), TINY) as stream:
        stream.whole("fine")
        with pytest.raises(CheckpointError, match="torch has no dtype for F6_E2M3; convert") as caught:
            stream.whole("six")
    assert (caught.value.tensor, caught.value.path) == ("six", checkpoint["six"].path)


def test_no_more_than_the_budget_is_asked_for(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x", {f"t{number:02}": ("U8", (100_000 + number,)) for number in range(60)})
    lanes: list[Lane] = []

    def opener(engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
        lanes.append(open_lane(engine, device, options))
        return lanes[-1]

    with open_stream(requests(checkpoint), TINY, opener=opener) as stream:
        (lane,) = lanes
        for name, entry in checkpoint.items():
            assert 0 < lane.bytes_in_flight <= MIB
            assert bytes_of(stream.whole(name)) == stored(entry)
        assert lane.bytes_in_flight == 0


def test_early_and_double_close(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x", {f"t{number}": ("F32", (1000, 300)) for number in range(4)})
    transport = Transport(TINY)
    stream = TensorStream(requests(checkpoint, in_bands=True), transport)
    assert any(os.path.realpath(f"/proc/self/fd/{fd}") == checkpoint.files[0] for fd in os.listdir("/proc/self/fd"))
    bands = stream.bands("t0")
    next(bands)
    transport.close()
    transport.close()
    with pytest.raises(CancelledError):
        next(bands)


@pytest.fixture
def endless(tmp_path: Path) -> Checkpoint:
    """A tensor that takes a second to read and no disk: a hole of 2 GiB."""
    path = tmp_path / "endless"
    header = json.dumps({"endless": {"dtype": "U8", "shape": [2 << 30], "data_offsets": [0, 2 << 30]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (2 << 30))
    return open_checkpoint(path)


def test_close_ends_a_wait_on_another_thread(endless: Checkpoint) -> None:
    transport = Transport(TINY)
    stream = TensorStream(requests(endless), transport)
    caught: list[Exception] = []

    def take() -> None:
        try:
            stream.whole("endless")
        except CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    time.sleep(0.05)
    transport.close()
    thread.join()
    assert len(caught) == 1


def test_control_c_ends_a_wait(endless: Checkpoint) -> None:
    asked: list[float] = []

    def interrupt() -> None:
        time.sleep(0.1)
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    recorder = Recorder()
    with open_stream(requests(endless), TINY, recorder=recorder) as stream:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            stream.whole("endless")
    assert time.monotonic() - asked[0] < 2
    assert recorder.report.engine["bytes_delivered"] < endless.nbytes


@pytest.mark.parametrize("in_bands", [False, True])
def test_a_file_cut_after_its_header_was_read(tmp_path: Path, in_bands: bool) -> None:
    checkpoint = write(tmp_path / "x", dict.fromkeys("abc", ("F32", (500, 100))))
    cut = checkpoint["b"].offset + 150_001
    os.truncate(checkpoint.files[0], cut)
    options = StreamOptions(threads=1, slot_bytes=8192, host_scratch=MIB)
    with open_stream(requests(unstamped(checkpoint), in_bands=in_bands), options) as stream:
        assert bytes_of(stream.whole("a")) == stored(checkpoint["a"])
        for name in ("b", "c"):
            with pytest.raises(TruncatedError, match=r"the file ends here, \d+ bytes before the tensor does") as caught:
                stream.whole(name)
            assert (caught.value.tensor, caught.value.path, caught.value.offset) == ("b", checkpoint.files[0], cut)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    here = write(tmp_path / "here", {"a": ("F32", (9,))})
    gone = write(tmp_path / "gone", {"b": ("F32", (9,))})
    os.unlink(gone.files[0])
    wanted = requests(here) + requests(gone)
    with pytest.raises(ReadError, match=r"cannot open the file.*: No such file") as caught, open_stream(wanted, TINY):
        pass
    assert (caught.value.path, caught.value.errno) == (gone.files[0], 2)


@pytest.mark.parametrize("model_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_transposed_weights(dtype: str, model_dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x", {"weight": (dtype, (611, 333))})
    with open_stream(requests(checkpoint), TINY) as stream:
        weight = stream.whole("weight")
    with open_stream(requests(checkpoint, in_bands=True), TINY) as stream:
        transposed = StreamSource(stream, checkpoint["weight"]).transposed_half(model_dtype)
    expected = weight.to(model_dtype).to(torch.float16).T.contiguous()
    assert transposed.is_contiguous()
    assert torch.equal(transposed.isnan(), expected.isnan())
    assert torch.equal(transposed.nan_to_num(nan=0.5).view(torch.int16), expected.nan_to_num(nan=0.5).view(torch.int16))


def test_without_kernels_torch_transposes_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = write(tmp_path / "x", {"one": ("BF16", (611, 333)), "two": ("F32", (300, 200))})
    asked = requests(checkpoint, in_bands=True)

    def transpose_all() -> list[torch.Tensor]:
        with open_stream(asked, TINY) as stream:
            return [stream.transposed_half(name, torch.bfloat16).nan_to_num(nan=0.5) for name in checkpoint]

    with_kernels = transpose_all()
    assert not caplog.records

    def refuse(*_: object) -> None:
        raise DeviceError("no kernel image is available")

    monkeypatch.setattr(_core.Engine, "transpose_to_half", refuse)
    with caplog.at_level(logging.WARNING, "pyint8"):
        without = transpose_all()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == ("Conv1D weights are transposed by torch, more slowly: no kernel image is available")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(without, with_kernels, strict=True))
