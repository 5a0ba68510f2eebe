"""The errors of a from_pretrained, of transformers' and PEFT's own making, as pyint8's, which say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from pyint8.errors import (
    CheckpointError,
    FileChangedError,
    ModelNotSupportedError,
    Pyint8Error,
    ReadError,
    WriteError,
)
from pyint8.models.keywords import unknown_keyword
from pyint8.models.request import LoadRequest

ASKS_FOR_TRUST = "trust_remote_code=True"
"""Part of transformers' error for a checkpoint that brings code."""

# What may say nothing of the checkpoint: too little memory, an absent package, a GPU's driver, the model's own code.
_AS_THEY_ARE = (Pyint8Error, MemoryError, ImportError, RuntimeError, TypeError)
# torch's words for what the system says of a file.
_REFUSED = re.compile(r"(unable|Error) .*file <(?P<path>.+)>.*: (?P<reason>.+) \((?P<errno>\d+)\)$", re.MULTILINE)
_PROBLEMS = {"metadata": 'the index has no `metadata`, which transformers wants: add "metadata": {}'}


@contextmanager
def named_failures(request: LoadRequest) -> Iterator[None]:
    """The one place that every exception passes in which transformers meets a file of the checkpoint.

    Raises:
        ReadError: The operating system refused.
        CheckpointError: Anything else, but for `_AS_THEY_ARE`.
    """
    try:
        yield
    except RecursionError as error:  # a RuntimeError
        raise _unreadable("JSON is nested too deeply", request, error) from error
    except OSError as error:
        if isinstance(error, Pyint8Error):
            raise
        problem = f"cannot be loaded: {_first_line(error)}; check the path, the disk and, for a hub id, the network"
        raise ReadError(problem, path=error.filename or request.base, errno=error.errno) from error
    except _AS_THEY_ARE as error:
        found = None if isinstance(error, Pyint8Error) else _REFUSED.search(str(error))
        if found is None:
            raise
        problem = f"cannot be read: {found['reason']}; check the disk, then try again"
        raise ReadError(problem, path=found["path"], errno=int(found["errno"])) from error
    except Exception as error:
        raise _unreadable(f"{type(error).__name__}: {_first_line(error)}", request, error) from error


def _unreadable(problem: str, request: LoadRequest, error: Exception) -> CheckpointError:
    problem = _PROBLEMS.get(str(error).strip("'"), problem) if isinstance(error, KeyError) else problem
    return CheckpointError(
        f"transformers cannot load this model ({problem}); check its config.json and other JSON files, or download it "
        "again",
        path=request.path,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def named_configuration(request: LoadRequest) -> Iterator[None]:
    """As `named_failures`, where only JSON files are read: whatever is raised is about them.

    Raises:
        CheckpointError: See there.
    """
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if isinstance(error, (Pyint8Error, RecursionError)) or request.arguments:
            raise
        raise _unreadable(f"{type(error).__name__}: {_first_line(error)}", request, error) from error


@contextmanager
def named_problems(request: LoadRequest, model_class: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turns from_pretrained's errors about wrong calls into errors that say what to do."""
    try:
        yield
    except SafetensorError as error:
        raise _of_safetensors(error, request) from error
    except OSError as error:
        if isinstance(error, Pyint8Error) or not _is_within(error.filename, request.offload_folder):
            raise
        raise _unwritten(error, request.offload_folder) from error
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in arguments:
            raise
        raise unknown_keyword(found[1], model_class.__name__) from error
    except ValueError as error:
        if ASKS_FOR_TRUST not in str(error):
            raise
        raise untrusted(request.path) from error


def _of_safetensors(error: SafetensorError, request: LoadRequest) -> Pyint8Error:
    if re.search(r"\bserializing", str(error)):
        return _unwritten(error, request.offload_folder)
    return FileChangedError(  # pyint8 has read the file's header
        f"a file of {request.path} changed while it was loaded ({error}); load it again, once nothing writes to it"
    )


def _is_within(path: Any, folder: str | None) -> bool:
    """Whether an error is about a folder, a file in it, or one of those that it lies in."""
    return isinstance(path, str) and folder is not None and (path.startswith(folder) or folder.startswith(path))


def _unwritten(error: Exception, folder: str | None) -> WriteError:
    """Of a weight that transformers writes to the offload folder."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return WriteError(
        f"a weight cannot be offloaded there ({error}); make room, or choose another offload_folder",
        path=folder,
        errno=number,
    )


def untrusted(path: str) -> ModelNotSupportedError:
    return ModelNotSupportedError(
        f"the checkpoint in {path} brings code of its own, which is not run unasked; read it, then pass "
        "trust_remote_code=True"
    )
