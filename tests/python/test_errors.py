"""Errors: what they carry, what they are, and that importing pyint8 costs nothing."""

import copy
import errno
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pyint8 import errors
from pyint8.errors import CheckpointNotFoundError, Pyint8Error, ReadError, TruncatedError, from_core

BUILTINS: dict[type[Pyint8Error], type[Exception]] = {
    errors.OptionError: ValueError,
    errors.EnvironmentNotSupportedError: RuntimeError,
    errors.MissingDependencyError: ImportError,
    errors.DependencyVersionError: ValueError,
    errors.ModelNotSupportedError: ValueError,
    errors.PlacementError: ValueError,
    errors.CheckpointError: ValueError,
    errors.CheckpointNotFoundError: FileNotFoundError,
    errors.HeaderError: ValueError,
    errors.TruncatedError: ValueError,
    errors.FileChangedError: ValueError,
    errors.ShapeMismatchError: ValueError,
    errors.ChecksumError: ValueError,
    errors.QuantizationStateError: ValueError,
    errors.NonFiniteWeightError: ValueError,
    errors.ReadError: OSError,
    errors.RemoteError: OSError,
    errors.WriteError: OSError,
    errors.DeviceError: RuntimeError,
    errors.CancelledError: RuntimeError,
    errors.PartlyReplacedError: RuntimeError,
    errors.RankError: RuntimeError,
}


def public_kinds() -> set[type]:
    found = {value for name, value in vars(errors).items() if isinstance(value, type) and not name.startswith("_")}
    return {kind for kind in found if issubclass(kind, Exception)} - {Pyint8Error}


def test_every_kind_is_known_here() -> None:
    assert public_kinds() == BUILTINS.keys()


@pytest.mark.parametrize("kind", BUILTINS)
def test_every_kind_derives_from_a_builtin(kind: type[Pyint8Error]) -> None:
    assert issubclass(kind, BUILTINS[kind])
    with pytest.raises(Pyint8Error, match=r"^broken$"):
        raise kind("broken")


@pytest.mark.parametrize("kind", BUILTINS)
@pytest.mark.parametrize("copier", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_every_kind_is_pickled_and_copied(kind: type[Pyint8Error], copier: object) -> None:
    place = {"path": "/a/b", "tensor": "x.weight", "offset": 7}
    error = kind("broken", **place)
    again = copier(error)  # type: ignore[operator]
    assert type(again) is kind
    assert str(again) == str(error)
    assert {name: getattr(again, name) for name in place} == place


@pytest.mark.parametrize("kind", BUILTINS)
def test_a_place_is_carried_and_said(kind: type[errors.CheckpointError]) -> None:
    error = kind("it is broken; mend it", path=Path("/a/b"), tensor="x.weight", offset=0)
    assert (error.path, error.tensor, error.offset, error.problem) == ("/a/b", "x.weight", 0, "it is broken; mend it")
    assert str(error) == "tensor 'x.weight', /a/b, byte 0: it is broken; mend it"
    assert str(kind("it is broken", path="/a/b")) == "/a/b: it is broken"
    error.tensor = "y.weight"  # the stream finds out later which tensor it was
    assert str(error).startswith("tensor 'y.weight'")


def test_errno_is_carried() -> None:
    error = ReadError("broken", path="/a/b", offset=3, errno=errno.EIO)
    again = pickle.loads(pickle.dumps(error))
    assert (again.errno, again.path, again.offset) == (errno.EIO, "/a/b", 3)


def test_what_was_replaced_is_carried() -> None:
    error = errors.PartlyReplacedError("broken", replaced=["a", "b"], torn="c")
    again = pickle.loads(pickle.dumps(error))
    assert (again.replaced, again.torn) == (("a", "b"), "c")


def test_the_rank_that_failed_is_carried() -> None:
    again = pickle.loads(pickle.dumps(errors.RankError("rank 1 of 2 failed", rank=1)))
    assert (str(again), again.rank) == ("rank 1 of 2 failed", 1)


def test_not_found_can_be_caught_as_the_builtin() -> None:
    with pytest.raises(FileNotFoundError, match=r"^/a/b: there is none$"):
        raise CheckpointNotFoundError("there is none", path="/a/b")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_argument", errors.OptionError),
        ("driver", errors.DeviceError),
        ("cancelled", errors.CancelledError),
        ("unknown", Pyint8Error),
    ],
)
def test_the_extensions_errors_have_their_kinds(code: str, kind: type[Pyint8Error]) -> None:
    error = from_core(code, "broken", "", None, 0)
    assert type(error) is kind
    assert str(error) == "broken"


def test_the_extensions_errors_have_their_places() -> None:
    read = from_core("io", "cannot read", "/a/b", 5, errno.EIO)
    assert isinstance(read, ReadError)
    assert (read.path, read.offset, read.errno) == ("/a/b", 5, errno.EIO)
    opened = from_core("io", "cannot open", "", None, 0)
    assert isinstance(opened, ReadError)
    assert (opened.path, opened.offset, opened.errno) == (None, None, None)
    cut = from_core("truncated", "ends here", "/a/b", 0, 0)
    assert isinstance(cut, TruncatedError)
    assert (cut.path, cut.offset) == ("/a/b", 0)
    for offset in (None, 7):
        changed = from_core("changed", "no longer", "/a/b", offset, 0)
        assert type(changed) is errors.FileChangedError
        assert (changed.path, changed.offset) == ("/a/b", offset)


def test_importing_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'bitsandbytes', 'accelerate', 'numpy', 'safetensors'}"
    script = f"import sys, pyint8, pyint8.checkpoint; print(*({heavy} & sys.modules.keys()), sep=',')"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_refusing_a_wrong_argument_needs_nothing_heavy() -> None:
    script = (
        "import sys, pyint8\n"
        "try: pyint8.load('x', config=5)\n"
        "except ValueError as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "config is 5; it must be a pyint8.Int8Config or None False"
