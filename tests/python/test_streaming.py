"""TensorStream over real files on the CPU: what arrives is what lies in the file, and nothing stays behind."""

import json
import logging
import math
import os
import random
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import over

from pyint8 import StreamOptions
from pyint8.checkpoint import DTYPES, Checkpoint, Entry, open_checkpoint
from pyint8.errors import CancelledError, CheckpointError, DeviceError, ReadError, TruncatedError
from pyint8.report import Recorder
from pyint8.streaming.chunks import TensorRequest
from pyint8.streaming.extension import _core
from pyint8.streaming.head_start import EarlyTensor, HeadStart
from pyint8.streaming.lane import Lane, open_lane
from pyint8.streaming.stream import StreamSource, TensorStream, open_stream
from pyint8.streaming.transport import ReadRequest, Transport

pytestmark = pytest.mark.usefixtures("nothing_left")

CPU = torch.device("cpu")
MIB = 1 << 20
TINY = StreamOptions(threads=2, slot_bytes=8192, host_scratch=MIB)  # bands of 128 KiB in a ring of 768 KiB
Spec = tuple[str, tuple[int, ...]]


def write(path: Path, specs: dict[str, Spec]) -> Checkpoint:
    """A safetensors file of random bytes with tensors of these dtypes and shapes."""
    header, data = {}, b""
    for number, (name, (dtype, shape)) in enumerate(specs.items()):
        raw = random.Random(number).randbytes(math.prod(shape) * DTYPES[dtype][0] // 8)
        raw = bytes(byte & 1 for byte in raw) if dtype == "BOOL" else raw
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return open_checkpoint(path)


def stored(entry: Entry) -> bytes:
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def content(tensor: torch.Tensor) -> bytes:
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def unstamped(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Entries that are read of the file in whatever state."""
    return {name: replace(entry, stamp=None) for name, entry in checkpoint.items()}


def requests(checkpoint: Mapping[str, Entry], *, in_bands: bool = False) -> list[TensorRequest]:
    return [TensorRequest(entry, CPU, in_bands) for entry in checkpoint.values()]


def joined(bands: Sequence[tuple[int, torch.Tensor]]) -> bytes:
    return b"".join(content(band) for _, band in bands)


MIXED: dict[str, Spec] = {
    "small": ("F32", (3, 5)),
    "large": ("F32", (700, 300)),  # 840 000 bytes: more than the ring of TINY
    "empty": ("F16", (0, 4)),
    "flat": ("F16", (3, 0)),
    "scalar": ("F64", ()),
    "vector": ("BF16", (200_000,)),
    "wide": ("F32", (2, 250_000)),  # a row is larger than the ring
    "odd": ("U8", (1000, 333)),
    "last": ("I64", (7,)),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write(tmp_path_factory.mktemp("mixed") / "model.safetensors", MIXED)


@pytest.mark.parametrize("direct_io", [False, True])
def test_whole_tensors_in_order(mixed: Checkpoint, direct_io: bool) -> None:
    recorder = Recorder()
    options = StreamOptions(threads=2, slot_bytes=8192, host_scratch=MIB, direct_io=direct_io)
    with open_stream(requests(mixed), options, recorder=recorder) as stream:
        for name, entry in mixed.items():
            tensor = stream.whole(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.torch_dtype, entry.torch_shape)
            assert content(tensor) == stored(entry)
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
                at, raw = at + len(band), raw + content(band)
            assert at == entry.shape[0]
            assert raw == stored(entry)


@pytest.mark.parametrize("name", MIXED)
def test_a_tensor_asked_for_in_bands_can_be_had_whole(mixed: Checkpoint, name: str) -> None:
    with open_stream([TensorRequest(mixed[name], CPU, in_bands=True)], TINY) as stream:
        tensor = stream.whole(name)
    assert tuple(tensor.shape) == mixed[name].shape
    assert content(tensor) == stored(mixed[name])


@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("name", ["scalar", "empty", "flat"])
def test_what_has_no_rows_comes_as_one_band(mixed: Checkpoint, name: str, in_bands: bool) -> None:
    with open_stream([TensorRequest(mixed[name], CPU, in_bands)], TINY) as stream:
        ((row, band),) = stream.bands(name)
        assert row == 0
        assert tuple(band.shape) == mixed[name].shape
        assert content(band) == stored(mixed[name])


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_any_part_any_form(mixed: Checkpoint, data: st.DataObject) -> None:
    names = data.draw(st.permutations(list(mixed)))
    banded = data.draw(st.sets(st.sampled_from(names)))
    taken = data.draw(st.permutations(names))[: data.draw(st.integers(0, len(names)))]
    asked = [TensorRequest(mixed[name], CPU, name in banded and mixed[name].shape != ()) for name in names]
    with open_stream(asked, TINY) as stream:
        for name in taken:
            raw = joined(list_of_bands(stream, name)) if name in banded else content(stream.whole(name))
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
            assert content(stream.whole(name)) == stored(entry)
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
        assert content(stream.whole("a")) == stored(checkpoint["a"])
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


# --- batches ----------------------------------------------------------------------------------------------------------

EXPERTS: dict[str, Spec] = {
    **{f"gate.{number}": ("BF16", (16, 64)) for number in range(100)},  # 2 KiB each; a batch has 128 KiB at most
    **{f"up.{number}": ("BF16", (64, 16)) for number in range(3)},
    "other": ("BF16", (64, 16)),
    "alone": ("F32", (5,)),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write(tmp_path_factory.mktemp("experts") / "model.safetensors", EXPERTS)


def in_batches(experts: Mapping[str, Entry]) -> list[TensorRequest]:
    return [TensorRequest(entry, CPU, batch="b" if name == "other" else "a") for name, entry in experts.items()]


def test_batches_land_together_and_are_cast_at_once(experts: Checkpoint) -> None:
    memory: dict[int, list[str]] = {}
    kept = []
    with open_stream(in_batches(experts), TINY) as stream:
        for name, entry in experts.items():
            tensor = stream.batched(name, torch.float64)
            kept.append(tensor)
            memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
            expected = torch.frombuffer(bytearray(stored(entry)), dtype=entry.torch_dtype).view(entry.torch_shape)
            assert tensor.is_contiguous()
            assert torch.equal(tensor.nan_to_num(nan=0.5), expected.double().nan_to_num(nan=0.5))
    names = list(EXPERTS)
    assert list(memory.values()) == [names[:64], names[64:100], names[100:103], ["other"], ["alone"]]


def test_a_batch_in_any_order(experts: Checkpoint) -> None:
    names = list(EXPERTS)
    random.Random(0).shuffle(names)
    recorder = Recorder()
    with open_stream(in_batches(experts), TINY, recorder=recorder) as stream:
        for name in names:
            assert content(stream.batched(name, experts[name].torch_dtype)) == stored(experts[name])
    assert recorder.report.checkpoint_bytes == recorder.report.engine["bytes_delivered"] == experts.nbytes


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_not_contiguous_is_in_no_batch(experts: Checkpoint, number: int) -> None:
    entries = [experts[f"gate.{number}"] for number in range(3)]
    entries[number] = replace(entries[number], stride=(1, 16))
    with open_stream([TensorRequest(entry, CPU, batch="a") for entry in entries], TINY) as stream:
        found = [stream.batched(entry.name, torch.bfloat16) for entry in entries]
    for entry, tensor in zip(entries, found, strict=True):
        elements = torch.frombuffer(bytearray(stored(entry)), dtype=torch.bfloat16)
        assert content(tensor) == content(entry.shaped(elements))


def test_what_landed_early_is_in_no_batch(experts: Checkpoint) -> None:
    start = HeadStart(CPU, (), 0, TINY)
    transport, early = start.take()
    lane = transport.lane(CPU)
    entry = experts["gate.7"]
    storage = torch.UntypedStorage(entry.nbytes)
    ticket = transport.submit(lane, [ReadRequest(entry.path, entry.offset, entry.nbytes, storage, stamp=entry.stamp)])
    early[entry.name] = EarlyTensor(entry, lane, storage, ticket)
    with over(in_batches(experts), transport, early) as stream:
        found = {name: stream.batched(name, experts[name].torch_dtype) for name in experts}
        for name, tensor in found.items():
            assert content(tensor) == stored(experts[name])
        assert found["gate.7"].untyped_storage().nbytes() == entry.nbytes
        assert found["gate.6"].untyped_storage().nbytes() == 7 * entry.nbytes


def test_an_error_names_the_tensor_of_a_batch(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x", EXPERTS)
    cut = checkpoint["gate.70"].offset + 1
    os.truncate(checkpoint.files[0], cut)
    with open_stream(
        in_batches(unstamped(checkpoint)), StreamOptions(threads=1, slot_bytes=8192, host_scratch=MIB)
    ) as stream:
        for name in list(checkpoint)[:64]:
            stream.batched(name, torch.float32)
        with pytest.raises(TruncatedError) as caught:
            stream.batched("gate.64", torch.float32)
        assert (caught.value.tensor, caught.value.offset) == ("gate.70", cut)


# --- a head start -----------------------------------------------------------------------------------------------------


@pytest.fixture
def every_size_is_worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)


@pytest.mark.usefixtures("every_size_is_worthwhile")
@pytest.mark.parametrize("in_bands", [False, True])
@pytest.mark.parametrize("nbytes", [0, 60, 1_000_000, 10_000_000])
def test_what_was_begun_early_is_taken_over(mixed: Checkpoint, nbytes: int, in_bands: bool) -> None:
    start = HeadStart(CPU, list(mixed.values()), nbytes, TINY)
    transport, early = start.take()
    with over(requests(mixed, in_bands=in_bands), transport, early) as stream:
        for name, entry in mixed.items():
            bands = [(row, content(band), len(band) if band.ndim else 1) for row, band in stream.bands(name)]
            assert b"".join(raw for _, raw, _ in bands) == stored(entry)
            assert [row for row, _, _ in bands] == [sum(rows for _, _, rows in bands[:i]) for i in range(len(bands))]
        assert transport.stats()["bytes_delivered"] == mixed.nbytes  # nothing was read twice


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_early_tensors_are_bands_of_no_more_than_the_scratch_has(mixed: Checkpoint) -> None:
    start = HeadStart(CPU, [mixed["large"]], 1 << 30, TINY)
    with over([TensorRequest(mixed["large"], CPU, in_bands=True)], *start.take()) as stream:
        sizes = [band.nbytes for _, band in stream.bands("large")]
    assert max(sizes) <= MIB // 8
    assert sum(sizes) == mixed["large"].nbytes


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_an_early_tensor_had_whole_is_the_memory_it_landed_in(mixed: Checkpoint) -> None:
    start = HeadStart(CPU, [mixed["large"]], 1 << 30, TINY)
    with over([TensorRequest(mixed["large"], CPU, in_bands=True)], *start.take()) as stream:
        tensor = stream.whole("large")
    assert content(tensor) == stored(mixed["large"])
    assert tensor.untyped_storage().nbytes() == mixed["large"].nbytes


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_what_was_begun_early_and_is_not_wanted_is_dropped(mixed: Checkpoint) -> None:
    start = HeadStart(CPU, list(mixed.values()), 1 << 30, TINY)
    with over([TensorRequest(mixed["last"], CPU)], *start.take()) as stream:
        assert content(stream.whole("last")) == stored(mixed["last"])


def test_small_tensors_are_not_begun_early(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x.safetensors", {"small": ("U8", (MIB - 1,)), "large": ("U8", (MIB,))})
    start = HeadStart(CPU, list(checkpoint.values()), 1 << 30, TINY)
    transport, early = start.take()
    assert set(early) == {"large"}
    transport.close()


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_head_start_asks_once(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it would let go of the interpreter's lock, and the thread that builds the model would keep it."""
    asked: list[int] = []
    submit = Transport.submit

    def counted(self: Transport, lane: Any, reads: list[Any], **more: Any) -> int:
        asked.append(len(reads))
        return submit(self, lane, reads, **more)

    monkeypatch.setattr(Transport, "submit", counted)
    start = HeadStart(CPU, list(mixed.values()), 1 << 30, TINY)
    transport, early = start.take()
    transport.close()
    assert asked == [len(early)]
    assert len(early) > 1


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_head_start_that_nobody_takes(mixed: Checkpoint) -> None:
    HeadStart(CPU, list(mixed.values()), 1 << 30, TINY).close()


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_head_start_that_fails_fails_when_it_is_taken(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x.safetensors", {"x": ("U8", (100,))})
    (tmp_path / "x.safetensors").unlink()
    start = HeadStart(CPU, list(checkpoint.values()), 1 << 30, TINY)
    with pytest.raises(ReadError, match="cannot open the file"):
        start.take()


@pytest.mark.usefixtures("every_size_is_worthwhile")
def test_a_file_cut_while_it_is_begun_early_names_the_tensor(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x.safetensors", {"x": ("U8", (100,)), "y": ("U8", (100_000,))})
    os.truncate(checkpoint["y"].path, checkpoint["y"].offset + 10)
    entries = unstamped(checkpoint)
    start = HeadStart(CPU, list(entries.values()), 1 << 30, TINY)
    with over(requests(entries), *start.take()) as stream, pytest.raises(TruncatedError) as caught:
        list(map(stream.whole, checkpoint))
    assert caught.value.tensor == "y"
