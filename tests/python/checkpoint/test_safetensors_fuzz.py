"""read_header beside safetensors itself: what it saves, and valid files with a change."""

import copy
import json
import math
import os
import re

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from judges import DELIBERATE, bytes_at, compare, ours, peer
from safetensors.torch import save_file
from safetensors_bytes import framed, write

from pyint8.checkpoint import DTYPES, read_header
from pyint8.errors import CheckpointError

SETTINGS = settings(
    deadline=None,
    max_examples=int(os.environ.get("PYINT8_TEST_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.safetensors")


@st.composite
def torch_tensors(draw):
    name = draw(st.sampled_from([name for name, (_, attribute) in DTYPES.items() if attribute]))
    dtype, shape = getattr(torch, DTYPES[name][1]), draw(SHAPES)
    if name == "F4" and not shape:
        shape = [1]  # safetensors counts F4 in pairs along the last dimension, so it has no scalar of it
    raw = os.urandom(math.prod(shape) * dtype.itemsize)
    if name == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    return torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)


@SETTINGS
@given(
    tensors=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"), torch_tensors(), max_size=6
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=3),
)
def test_what_safetensors_saves_is_read_back(tensors, metadata, path):
    save_file(tensors, path, metadata)
    file = read_header(path)
    assert file.entries.keys() == tensors.keys()
    assert file.metadata == (metadata or {})
    assert file.size == os.path.getsize(path)
    assert [entry.offset for entry in file.entries.values()] == sorted(e.offset for e in file.entries.values())
    for name, tensor in tensors.items():
        entry = file.entries[name]
        assert (entry.name, entry.path, entry.torch_dtype, entry.torch_shape) == (
            name,
            path,
            tensor.dtype,
            tensor.shape,
        )
        assert entry.is_floating == tensor.dtype.is_floating_point
        assert entry.numel == tensor.numel() * (2 if entry.dtype == "F4" else 1)
        assert bytes_at(entry) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@st.composite
def valid_files(draw):
    """A valid header as a dict, and its data."""
    whole_bytes = st.tuples(st.sampled_from([name for name, (bits, _) in DTYPES.items() if bits >= 8]), SHAPES)
    sub_byte = st.tuples(st.sampled_from(["F4", "F6_E2M3", "F6_E3M2"]), SHAPES.map(lambda shape: [*shape, 4]))
    header, end = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}, 0
    for name, (dtype, shape) in draw(
        st.dictionaries(st.sampled_from("abcd"), whole_bytes | sub_byte, min_size=1)
    ).items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype][0] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, bytes(i % 256 for i in range(end))


# fmt: off
VALUES = st.sampled_from([
    None, True, False, -1, 0, 1, 2, 3, 4, 8, 2**32, 2**60, 2**63, 2**64 - 1, 2**64, 10**400, 1.0, -0.0, "", "F32", "I8",
    "F4", "NOPE", [], {}, [0], [0, 0], [0, 8], [8, 0], [0, 8, 8], {"F32": None}, ["F32", [2], [0, 8]], {"a": "b"},
]).map(copy.deepcopy)
SNIPPETS = st.sampled_from([
    b" ", b"\n", b"\t", b"\0", b",", b":", b'"', b"[", b"]", b"{", b"}", b"0", b"-", b".0", b"e1", b"\\", b"\\u0061",
    b"\\ud800", b"\\ude00", b"\xff", b"\xc3\xa9", b"\xef\xbb\xbf", b"NaN", b"null", b'"a":', b'"x":1e999,', b'"x":-0,',
    b'"dtype":"I8",', b'"x":"\\ud83d\\ude00",', b'"x":"\\ud83d",',
    *(b'"x":' + b"[" * depth + b"]" * depth + b"," for depth in (125, 126)),
])
# fmt: on


@SETTINGS
@given(st.data())
def test_a_changed_header_is_judged_as_safetensors_judges_it(path, data):
    header, content = data.draw(valid_files())
    for _ in range(data.draw(st.integers(0, 2))):
        node = header
        key = data.draw(st.sampled_from(list(node)))
        while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
            node = node[key]
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        change = data.draw(st.sampled_from(["replace", "delete", "add", "nudge"]))
        if change == "replace":
            node[key] = data.draw(VALUES)
        elif change == "delete" and len(node) > 1:
            del node[key]
        elif change == "add" and isinstance(node, dict):
            node["new"] = data.draw(VALUES)
        elif isinstance(node[key], int):
            node[key] += data.draw(st.integers(-8, 8))
    content = data.draw(st.sampled_from([content, content, content[:-1], content + b"\0", content[:-9]]))
    write(path, framed(json.dumps(header).encode(), content))
    compare(path)


@SETTINGS
@given(st.data())
def test_changed_bytes_are_judged_as_safetensors_judges_them(path, data):
    header, content = data.draw(valid_files())
    text = json.dumps(header).encode()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(
            st.sampled_from([m.end() for m in re.finditer(rb"[{}\[\],:\"]", text)]) | st.integers(0, len(text))
        )
        text = text[:at] + data.draw(SNIPPETS | st.binary(max_size=2)) + text[at + data.draw(st.integers(0, 2)) :]
    raw = bytearray(framed(text, content))
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, 7))] ^= data.draw(st.integers(0, 255))
    write(path, bytes(raw[: data.draw(st.none() | st.integers(0, len(raw)))]))
    compare(path)


@SETTINGS
@given(st.binary(max_size=64))
@example(b"")
def test_any_bytes_are_judged_as_safetensors_judges_them(path, raw):
    write(path, raw)
    compare(path)


@pytest.mark.parametrize("depth", range(123, 129))
def test_nesting_is_followed_as_deep_as_safetensors_follows_it(path, depth):
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":' + b"[" * depth + b"1" + b"]" * depth + b"}}"
    write(path, framed(text, b"1"))
    assert (peer(path) is None) == isinstance(ours(path), CheckpointError)


@pytest.mark.parametrize(
    "text",
    [
        b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":["U8",[1],[0,1]]}',
        b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"__metadata__":{"x":"1","x":"2"}}',
    ],
)
def test_the_deliberate_differences(path, text):
    write(path, framed(text, b"1"))
    assert peer(path) is not None
    with pytest.raises(CheckpointError, match=DELIBERATE.pattern):
        read_header(path)
