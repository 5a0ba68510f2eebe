"""read_header against each rule of the format; test_safetensors_fuzz.py compares it with safetensors itself."""

import errno
import gc
import json
import os
import subprocess
import sys

import pytest
import safetensors
from safetensors_bytes import framed, write

from pyint8.checkpoint import DTYPES, Entry, read_header
from pyint8.errors import CheckpointError, CheckpointNotFoundError, HeaderError, ReadError, TruncatedError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.safetensors")


PAIR = {"a": F32, "b": {**F32, "data_offsets": [8, 16]}}
BEGIN = 8 + len(json.dumps({"a": F32}))


@pytest.mark.parametrize(
    ("content", "kind", "tensor", "offset", "words"),
    [
        (b"", TruncatedError, None, 0, "0 bytes, fewer than the 8"),
        (b"1234567", TruncatedError, None, 7, "7 bytes, fewer than the 8"),
        (framed(b"{}")[:9], TruncatedError, None, 9, "length is 2, but the file ends 1 bytes earlier"),
        ((100_000_001).to_bytes(8, "little") + b"{}", HeaderError, None, 0, "more than the 100000000"),
        (b"version https://git-lfs.github.com/spec/v1\n", HeaderError, None, 0, "git lfs pull"),
        (framed(b""), HeaderError, None, 8, "does not begin with '{'"),
        (framed(b" {}"), HeaderError, None, 8, "does not begin with '{'"),
        (framed(b"[]"), HeaderError, None, 8, "does not begin with '{'"),
        (framed(b'{"\xff":1}'), HeaderError, None, 10, "not UTF-8"),
        (framed(b'{"\xc3\xa9":nope}'), HeaderError, None, 14, "not valid JSON"),
        (framed(b"{}\0"), HeaderError, None, 10, "not valid JSON: Extra data"),
        (framed(b'{"\\ud800":1}'), HeaderError, None, None, "surrogate"),
        (framed(b'{"a":NaN}'), HeaderError, None, None, "NaN is not a JSON value"),
        (framed(b'{"a":1e999}'), HeaderError, None, None, "out of range"),
        (framed(b'{"a":' + b"[" * 10**6), HeaderError, None, None, "nested deeper than 127"),
        (framed(b'{"a":' + b"[" * 127 + b"]" * 127 + b"}"), HeaderError, None, None, "nested deeper than 127"),
        (framed(b'{"]]":"[","a":' + 127 * b"[" + 127 * b"]" + b"}"), HeaderError, None, None, "nested deeper than 127"),
        (framed(b'{"\\"":' + b'{"":' * 127 + b"[]" + b"}" * 128), HeaderError, None, None, "nested deeper than 127"),
        (framed(b'{"a":{},"a":{}}'), HeaderError, None, None, "key 'a' appears twice"),
        (framed(b'{"a":{"dtype":"I8","dtype":"I8"}}'), HeaderError, None, None, "key 'dtype' appears twice"),
        (framed(b'{"__metadata__":{"x":"","x":""}}'), HeaderError, None, None, "key 'x' appears twice"),
        (framed({"__metadata__": ["x"]}), HeaderError, None, None, "__metadata__ is ['x'], not an object"),
        (framed({"__metadata__": {"x": 1}}), HeaderError, None, None, "__metadata__ has 1 under 'x'"),
        (framed({"a": ["F32", [2], [0, 8]]}), HeaderError, "a", None, "not by an object"),
        (framed({"a": {"dtype": "F32"}}), HeaderError, "a", None, "lacks shape, data_offsets"),
        (framed({"a": {**F32, "dtype": "NF4"}}), HeaderError, "a", None, "unknown dtype 'NF4'; the format's are BOOL"),
        (framed({"a": {**F32, "dtype": {"F32": None}}}), HeaderError, "a", None, "unknown dtype {'F32': None}"),
        (framed({"a": {**F32, "shape": [True, 2]}}), HeaderError, "a", None, "shape [True, 2] is not a list"),
        (framed({"a": {**F32, "shape": [-2]}}), HeaderError, "a", None, "shape [-2] is not a list"),
        (framed({"a": {**F32, "shape": [2.0]}}), HeaderError, "a", None, "shape [2.0] is not a list"),
        (framed({"a": {**F32, "shape": [2**64]}}), HeaderError, "a", None, "is not a list of non-negative 64-bit"),
        (framed({"a": {**F32, "data_offsets": [8, 0]}}), HeaderError, "a", None, "data_offsets [8, 0] are not"),
        (framed({"a": {**F32, "data_offsets": [0, 8, 8]}}), HeaderError, "a", None, "data_offsets [0, 8, 8] are not"),
        (framed({"a": {**F32, "data_offsets": [False, 8]}}), HeaderError, "a", None, "data_offsets [False, 8] are not"),
        (framed({"a": {**F32, "shape": [3]}}), HeaderError, "a", BEGIN, "is 12 bytes, but its data_offsets span 8"),
        (framed({"a": {**F32, "shape": [2**32, 2**32, 0]}}), HeaderError, "a", None, "more elements or bits than 64"),
        (framed({"a": {**F32, "shape": [2**60]}}), HeaderError, "a", None, "more elements or bits than 64"),
        (framed({"a": {**F32, "dtype": "F4", "shape": [3]}}), HeaderError, "a", None, "12 bits, not whole bytes"),
        (framed({**PAIR, "b": {**F32, "data_offsets": [4, 12]}}), HeaderError, "b", None, "overlaps tensor 'a'"),
        (framed({**PAIR, "b": {**F32, "data_offsets": [9, 17]}}), HeaderError, "b", None, "hole of 1 bytes after"),
        (framed({"a": {**F32, "data_offsets": [1, 9]}}), HeaderError, "a", None, "hole of 1 bytes after the header"),
        (framed({"a": F32}, bytes(9)), HeaderError, None, BEGIN + 8, "1 bytes follow the last tensor"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_broken_rule_is_named_with_its_place(path, content, kind, tensor, offset, words):
    write(path, content)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(kind) as caught:
        read_header(path)
    assert os.listdir("/proc/self/fd") == descriptors
    error = caught.value
    assert (error.path, error.tensor) == (path, tensor)
    assert offset is None or error.offset == offset
    assert path in str(error)
    assert words in str(error)


def test_truncation_names_the_first_cut_tensor_and_the_end_of_the_file(path):
    whole = framed(PAIR | {"c": {**F32, "data_offsets": [16, 24]}}, bytes(24))
    write(path, whole[:-11])
    with pytest.raises(TruncatedError, match=f"tensor 'b', .*byte {len(whole) - 11}: .*11 bytes too early") as caught:
        read_header(path)
    assert (caught.value.tensor, caught.value.offset) == ("b", len(whole) - 11)


def test_unknown_keys_null_metadata_and_trailing_white_space_are_accepted_as_by_safetensors(path):
    header = json.dumps({"__metadata__": None, "a": {**F32, "note": {"deep": [1]}}}).encode() + b"  \n"
    write(path, framed(header, bytes(8)))
    with safetensors.safe_open(path, "pt") as opened:
        assert (opened.keys(), opened.metadata()) == (["a"], None)
    assert read_header(path).metadata == {}
    expected = Entry("a", "F32", (2,), path, 8 + len(header), 8, stamp=read_header(path).stamp)
    assert read_header(path).entries == {"a": expected}


def test_a_file_of_several_gigabytes_is_read_by_its_header_alone(path):
    big = 5_600_000_000
    header = {
        "small": {"dtype": "U8", "shape": [3], "data_offsets": [big, big + 3]},
        "empty": {"dtype": "F32", "shape": [0], "data_offsets": [big, big]},
        "big": {"dtype": "BF16", "shape": [70_000, 40_000], "data_offsets": [0, big]},
    }
    start = len(framed(header))
    write(path, framed(header))
    os.truncate(path, start + big + 3)
    file = read_header(path)
    assert file.size == start + big + 3
    assert [(e.name, e.offset, e.nbytes) for e in file.entries.values()] == [
        ("big", start, big),
        ("empty", start + big, 0),
        ("small", start + big, 3),
    ]
    os.truncate(path, start + big + 2)
    with pytest.raises(TruncatedError, match=r"tensor 'small'.*1 bytes too early"):
        read_header(path)


def test_what_the_operating_system_refuses_is_a_typed_error(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"absent\.safetensors: there is no such file") as missing:
        read_header(tmp_path / "absent.safetensors")
    assert isinstance(missing.value, FileNotFoundError)
    with pytest.raises(ReadError, match="this is a folder and no file") as folder:
        read_header(tmp_path)
    assert (folder.value.errno, folder.value.path) == (errno.EISDIR, str(tmp_path))


def test_no_permission_is_a_read_error_with_its_errno(path):
    write(path, framed({}))
    os.chmod(path, 0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(ReadError, match="permission") as caught:
            read_header(path)
    finally:
        os.seteuid(user)
    assert caught.value.errno == errno.EACCES


def test_dtypes_are_those_of_safetensors(path):
    write(path, framed({"a": {**F32, "dtype": "NOPE"}}, bytes(8)))
    with pytest.raises(safetensors.SafetensorError) as caught, safetensors.safe_open(path, "pt"):
        pass
    assert set(str(caught.value).split("expected one of ")[1].split(" at line")[0].replace("`", "").split(", ")) == set(
        DTYPES
    )


def test_a_dtype_that_torch_lacks_is_named_with_its_place():
    entry = Entry("w", "F6_E2M3", (4,), "f.safetensors", 64, 3)
    with pytest.raises(CheckpointError, match=r"tensor 'w', f\.safetensors, byte 64: torch has no dtype for F6_E2M3"):
        _ = entry.torch_dtype
    with pytest.raises(CheckpointError, match=r"tensor 'w', f\.safetensors, byte 64: torch packs F4 in pairs"):
        _ = Entry("w", "F4", (2, 3), "f.safetensors", 64, 3).torch_shape


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'safetensors', 'numpy', 'bitsandbytes'}"
    code = f"import sys, pyint8.checkpoint; assert not {heavy} & sys.modules.keys()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_many_tensors_are_read_without_looking_for_garbage(path):
    tensors = {f"{number}": {**F32, "data_offsets": [8 * number, 8 * number + 8]} for number in range(30_000)}
    write(path, framed(tensors, bytes(8 * len(tensors))))
    collections = []

    def note(phase, info):
        collections.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    try:
        header = read_header(path)
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()
    assert len(header.entries) == len(tensors)
    assert collections == []
