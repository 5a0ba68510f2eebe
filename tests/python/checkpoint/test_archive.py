"""Archives as torch.save writes them, and as others zip the same records: the values are torch.load's, or none."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pyint8.checkpoint import EntryInMemory, read_pickled
from pyint8.errors import CheckpointError, Pyint8Error
from pyint8.streaming.reading import read_tensor

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
Records = list[tuple[str, bytes]]


def unzipped(path: Path) -> Records:
    with zipfile.ZipFile(path) as archive:
        return [(record.filename, archive.read(record)) for record in archive.infolist()]


def zipped(path: Path, records: Records, compression: int = STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = STORED) -> None:
    zipped(path, [(name, change(name, content)) for name, content in unzipped(path)], compression)


def values(path: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in read_pickled(path).entries.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == value.dtype and torch.equal(ours[name], value) for name, value in theirs.items()
    )


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors or {name: torch.full((64,), float(i)) for i, name in enumerate("abc")}, path)
    return path


def test_records_in_another_order_than_their_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin")
    raw = path.read_bytes()
    for old, new in ((b"/data/1", b"/data/X"), (b"/data/2", b"/data/1"), (b"/data/X", b"/data/2")):
        raw = raw.replace(old, new)
    path.write_bytes(raw)
    assert torch.load(path)["b"][0] == 2
    assert same(values(path), torch.load(path))


def test_records_that_were_zipped_again_are_still_read_by_offset(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin")
    records = [(name.replace("x/", "another name/", 1), content) for name, content in unzipped(path)]
    zipped(path, records[::-1])
    assert not any(isinstance(entry, EntryInMemory) for entry in read_pickled(path).entries.values())
    assert same(values(path), torch.load(path))


def test_compressed_records_are_read_into_memory(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", flat=torch.randn(1000), transposed=torch.randn(7, 5).T)
    expected = torch.load(path)
    rewrite(path, lambda _, content: content, DEFLATED)
    assert all(isinstance(entry, EntryInMemory) for entry in read_pickled(path).entries.values())
    assert same(values(path), expected)


def test_no_memory_is_taken_for_what_cannot_inflate_to_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", zeros=torch.zeros(10_000_000))
    rewrite(path, lambda _, content: content, DEFLATED)
    assert values(path)["zeros"].numel() == 10_000_000
    with zipfile.ZipFile(path) as archive:
        (record,) = (each for each in archive.infolist() if each.filename.endswith("data/0"))
    raw = path.read_bytes()
    directory = raw.rindex(b"x/data/0") - 46  # of its entry, 24 bytes before the size it inflates to
    path.write_bytes(raw[: directory + 24] + (0xEFFFFFFF).to_bytes(4, "little") + raw[directory + 28 :])
    with pytest.raises(
        CheckpointError, match=rf"data/0 cannot have 4026531839 bytes, of which .* {record.compress_size}"
    ):
        read_pickled(path)


def test_numbers_of_the_other_byte_order(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", x=torch.randn(30), y=torch.arange(7))
    expected = torch.load(path)
    swapped = {f"x/data/{key}": tensor.numpy().byteswap().tobytes() for key, tensor in enumerate(expected.values())}
    rewrite(path, lambda name, content: b"big" if name.endswith("byteorder") else swapped.get(name, content))
    assert same(torch.load(path), expected)
    assert same(values(path), expected)
    rewrite(path, lambda name, content: b"odd" if name.endswith("byteorder") else content)
    with pytest.raises(CheckpointError, match=r"torch cannot read it .Unknown endianness type: odd"):
        read_pickled(path)


@pytest.mark.parametrize("resize", [lambda content: content[:-4], lambda content: content + b"1234"])
def test_a_record_of_another_length_than_its_storage(tmp_path: Path, resize: Callable[[bytes], bytes]) -> None:
    """Older torch reads memory that is not its own for one that is too short."""
    path = saved(tmp_path / "x.bin")
    rewrite(path, lambda name, content: resize(content) if name.endswith("data/1") else content)
    with pytest.raises(CheckpointError, match=r"record data/1 has \d+ bytes, and its storage 256; download") as caught:
        read_pickled(path)
    assert caught.value.path == str(path)


def test_a_record_that_is_missing(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin")
    zipped(path, [record for record in unzipped(path) if not record[0].endswith("data/2")])
    with pytest.raises(CheckpointError, match=r"no record data/2, which its pickle names; download"):
        read_pickled(path)


def test_a_record_beyond_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with torch.serialization.skip_data():  # the first storage is a hole in the file
        torch.save({"hole": torch.empty((1 << 32) + 4096, dtype=torch.uint8), "behind": torch.empty(5)}, path)
    entry = read_pickled(path).entries["behind"]
    assert entry.offset > 1 << 32
    expected = torch.randn(5)
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(expected.numpy().tobytes())
    assert torch.equal(torch.load(path, mmap=True)["behind"], expected)
    assert torch.equal(read_tensor(read_pickled(path).entries["behind"]), expected)


def test_an_archive_of_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.script(torch.nn.Linear(3, 3)).save(path)
    with pytest.raises(CheckpointError):
        read_pickled(path)


def test_a_directory_that_zipfile_does_not_understand(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin")
    raw = bytearray(path.read_bytes())
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 6] = 99  # the version of the format that is needed to read this
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"directory cannot be read \(zip file version 9.9\)"):
        read_pickled(path)


class Marked(torch.Tensor):
    """A tensor that means something else."""


def test_what_is_more_or_less_than_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", x=torch.zeros(3).as_subclass(Marked))
    with torch.serialization.safe_globals([Marked]), pytest.raises(CheckpointError, match="the tensor is a Marked"):
        read_pickled(path)
    torch.save({"x": torch.zeros(3, device="meta")}, path)
    with pytest.raises(CheckpointError, match="saved without values") as caught:
        read_pickled(path)
    assert caught.value.tensor == "x"


def test_opening_leaves_nothing_behind(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", **{str(i): torch.randn(3) for i in range(50)})

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    for _ in range(3):
        read_pickled(path)
    before = objects()
    for _ in range(20):
        read_pickled(path)
    assert objects() - before < 20


def test_first_opens_in_several_threads(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin")
    program = (
        "import sys, threading; from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "from pyint8.checkpoint import open_checkpoint\n"
        "wait = threading.Barrier(8)\n"
        "def opened(_): wait.wait(); return len(open_checkpoint(sys.argv[1]))\n"
        "assert list(Pool(8).map(opened, range(8))) == [3] * 8\n"
    )
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=300)


# --- changed at random ------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """What becomes of one record."""

    kept: bool = True
    compressed: bool = False
    resized_by: int = 0
    padding: int = 0  # before its content, in the local header
    copies: int = 1  # of the same name, each with other content


changes = st.builds(
    Change,
    kept=st.sampled_from([True] * 30 + [False]),
    compressed=st.sampled_from([False] * 6 + [True]),
    resized_by=st.sampled_from([0] * 40 + [-8, -1, 1, 8]),
    padding=st.sampled_from([0, 4, 64, 1000]),
    copies=st.sampled_from([1] * 12 + [2]),
)


def resized(content: bytes, change: Change) -> bytes:
    return content[: change.resized_by] if change.resized_by < 0 else content + b"\7" * change.resized_by


def write_changed(path: Path, records: Records, changed: dict[str, Change], top: str, zip64: bool) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            change = changed.get(name.partition("/")[2], Change())
            for copy in range(change.copies if change.kept else 0):
                record = zipfile.ZipInfo(f"{top}/{name.partition('/')[2]}")
                record.compress_type = DEFLATED if change.compressed else STORED
                record.extra = b"FB" + change.padding.to_bytes(2, "little") + b"Z" * change.padding
                with archive.open(record, "w", force_zip64=zip64) as file:
                    file.write(bytes(byte ^ copy for byte in resized(content, change)))


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool]))
        base = torch.randint(0, 2 if dtype is torch.bool else 100, (draw(st.integers(0, 9)), 6)).to(dtype)
        state[f"whole{number}"] = base
        if draw(st.booleans()):
            state[f"transposed{number}"] = base.T
        if draw(st.booleans()):
            state[f"part{number}"] = base[1:, 2::3]
        if draw(st.booleans()) and dtype.is_floating_point:
            state[f"parameter{number}"] = torch.nn.Parameter(base)
    return state


def torch_load(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts(), data=st.data(), seed=st.randoms(use_true_random=False))
def test_the_values_are_torch_load_s_or_none(
    tmp_path: Path, state: dict[str, torch.Tensor], data: st.DataObject, seed: random.Random
) -> None:
    path = tmp_path / "x.bin"
    torch.save(state, path)
    records = unzipped(path)
    lengths = {name.partition("/")[2]: len(content) for name, content in records}
    changed = data.draw(st.dictionaries(st.sampled_from(list(lengths)), changes))
    for name, change in changed.items():
        if not lengths[name] or not name.startswith("data/"):  # of the others, torch minds some that matter to nobody
            change.resized_by = 0
    if data.draw(st.booleans()):
        seed.shuffle(records)
    write_changed(path, records, changed, data.draw(st.sampled_from(["x", "archive", "a b"])), data.draw(st.booleans()))
    is_resized = any(change.resized_by and change.kept for change in changed.values())
    theirs = ValueError("another length") if is_resized else torch_load(path)  # older torch takes such records
    if isinstance(theirs, Exception):
        event("refused")
        with pytest.raises(Pyint8Error) as caught:
            read_pickled(path)
        assert getattr(caught.value, "path", None) == str(path)
    else:
        event("read")
        assert same(values(path), theirs)
    os.unlink(path)
