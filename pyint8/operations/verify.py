"""Whether a checkpoint is whole and sound: `pyint8.verify`. Every byte of it is read."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.entry import SCALES
from pyint8.checkpoint.find import check_path, configuration, find_checkpoint
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import CheckpointError, CheckpointNotFoundError, OptionError, Pyint8Error, ReadError
from pyint8.host import ending, garbage
from pyint8.host.files import is_file
from pyint8.host.imports import importing
from pyint8.models.keywords import FINDING, called, refuse_others
from pyint8.models.transformers.releases import require_transformers
from pyint8.operations.common import (
    check_options,
    check_whereabouts,
    decoded,
    devices_of,
    located,
    options_for,
    prepare,
)
from pyint8.remote.objects import url_of
from pyint8.remote.urls import is_url
from pyint8.report import Recorder

if TYPE_CHECKING:
    import torch

    from pyint8.models.request import LoadRequest
    from pyint8.models.transformers.comparing import Comparison
    from pyint8.models.transformers.converting import Conversion

_QUANTIZATION = "quantization_config"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a checkpoint.

    Attributes:
        problem: What, and what to do about it.
        tensor: The tensor's name, if one is at fault.
        path: The file, if one is.
        offset: Where in the file, in bytes from its start.
    """

    problem: str
    tensor: str | None = None
    path: str | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Verification:
    """Returned by `pyint8.verify`.

    Attributes:
        path: What was verified.
        against: The source it was compared with, if one was given.
        files: The files that were read.
        tensors: How many tensors they have.
        int8_weights: How many of them are int8 codes with scales.
        nbytes: Of all tensors.
        compared: How many tensors were compared with what the source gives.
        not_compared: Those for which the source has no values, because they are drawn at random (a fresh head).
        findings: All that is wrong, by file and offset.
        seconds: What it took.
    """

    path: str
    against: str | None
    files: tuple[str, ...]
    tensors: int
    int8_weights: int
    nbytes: int
    compared: int
    not_compared: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found to be wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Everything, `is_sound` included, as JSON has it."""
        plain = {**asdict(self), "is_sound": self.is_sound}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def verify(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    device: torch.device | str | int | None = None,
    progress: bool | None = None,
    options: StreamOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **hub_kwargs: Any,
) -> Verification:
    """Read all of a checkpoint, and list what is wrong with it; it need not fit in memory.

    Looked for are tensors that cannot be read, indexes that contradict their shards, int8 codes without scales, scales
    that are not finite or of another shape, an unknown `weight_format`, a configuration that does not say that codes
    are int8. With `against`, also codes and scales that are not those of a fresh quantization, and all other tensors
    that are not byte for byte what `pyint8.convert` would write, with the dtype and the skipped modules of the
    checkpoint's own configuration.

    Args:
        path: A folder, a file, a hub id that is in the local cache, or a URL (see `pyint8.load`): an int8 checkpoint,
            or one in 16 or 32 bit.
        against: The folder, hub id or URL of the 16- or 32-bit checkpoint that an int8 one of a transformers model was
            made of.
        device: Where its weights are quantized, whose bits depend on the kind of device: the kind that `path` was made
            on. "cpu", "cuda", "cuda:1"; None for all visible GPUs, or the CPU where there is none. Only with `against`.
        progress: Whether to show a bar; None shows one on a terminal.
        options: How to move bytes; there is no report that a timeline would be in.
        storage_options: For URLs, as in `pyint8.load`.
        hub_kwargs: Where both are found: revision, subfolder, trust_remote_code and so on. With `against` also how that
            is loaded.

    Returns:
        What was found; errors of `path` are findings.

    Raises:
        CheckpointNotFoundError: There is no checkpoint.
        Pyint8Error: Another of `pyint8.errors`, about the arguments, or about `against`.
    """
    start = time.perf_counter()
    name, other = decoded(path), None if against is None else decoded(against)
    check_options(options)
    check_whereabouts(storage_options, hub_kwargs, name, other)
    if options is not None and options.timeline:
        raise OptionError("timeline is for what returns a LoadReport, which would have it; pyint8.verify returns none")
    options = options_for(other if other is not None and is_url(other) else name, options)
    problems: list[Pyint8Error] = []
    with ExitStack() as stack:
        stack.enter_context(called("verify", hub_kwargs))
        if other is None:
            _refuse_unread(device, hub_kwargs)
        path = stack.enter_context(located(name, hub_kwargs, storage_options))
        source = None if other is None else stack.enter_context(located(other, hub_kwargs, storage_options))
        check_path(path, hub_kwargs, is_plain=source is None)
        recorder = stack.enter_context(Recorder(progress))
        stack.enter_context(ending.awaited(recorder))
        with garbage.paused():
            checkpoint = _opened(path, hub_kwargs, problems)
        with importing:
            import pyint8.models.verifying  # noqa: F401
        problems += _misfits(checkpoint, path, hub_kwargs)
        comparison = None
        if source is None:
            problems += _read(checkpoint, options, recorder)
        else:
            comparison, found = _compare(checkpoint, _request(path, source, options, hub_kwargs), device, recorder)
            problems += found
        files, findings = tuple(map(url_of, checkpoint.files)), _findings(problems)
    return Verification(
        path=name,
        against=other,
        files=files,
        tensors=len(checkpoint),
        int8_weights=sum(name.endswith((f".{SCALES}", f"_{SCALES}")) for name in checkpoint),
        nbytes=checkpoint.nbytes,
        compared=0 if comparison is None else len(checkpoint) - len(comparison.left()),
        not_compared=() if comparison is None else tuple(sorted(comparison.not_compared)),
        findings=findings,
        seconds=time.perf_counter() - start,
    )


def _refuse_unread(device: Any, arguments: Mapping[str, Any]) -> None:
    """Refuses what is for the source alone, where there is none."""
    if device is not None:
        raise OptionError("device says where the weights of `against` are quantized; give that, or leave device out")
    refuse_others("verify", arguments, FINDING, "without `against` no model is made, and nothing would read it")


def _opened(path: str, arguments: Mapping[str, Any], problems: list[Pyint8Error]) -> Checkpoint:
    """What of the checkpoint can be opened."""
    try:
        checkpoint = find_checkpoint(path, arguments, problems)
    except CheckpointNotFoundError:
        raise
    except (CheckpointError, ReadError) as error:
        problems.append(error)
        return Checkpoint([])
    if checkpoint is None:
        raise CheckpointNotFoundError(
            f"the hub id {path} is not in the local cache; download it first: `hf download {path}`", path=path
        )
    return checkpoint


def _misfits(checkpoint: Checkpoint, path: str, arguments: Mapping[str, Any]) -> list[Pyint8Error]:
    """What the headers and the configuration show."""
    from pyint8.models.verifying import misfits

    found = list(misfits(checkpoint))
    try:
        described = configuration(path, arguments) if not is_file(path) else None
    except (CheckpointError, ReadError) as error:
        return [*found, error]
    if described is None:
        return found
    file, config = described
    if checkpoint.has_codes and not config.get(_QUANTIZATION):
        problem = f"it does not say that the weights are int8 (no {_QUANTIZATION}), so codes would be taken for weights"
        found.append(CheckpointError(f"{problem}; save the model again", path=file))
    return found


def _read(checkpoint: Checkpoint, options: StreamOptions, recorder: Recorder) -> list[Pyint8Error]:
    from pyint8.models.verifying import StoredBytes, Verifier

    with StoredBytes(list(checkpoint.values()), options, recorder) as stored:
        verifier = Verifier(checkpoint, stored)
        for name in checkpoint:
            verifier.check(name)
    return [*stored.errors, *verifier.problems]


def _compare(
    checkpoint: Checkpoint, request: LoadRequest, device: Any, recorder: Recorder
) -> tuple[Comparison, list[Pyint8Error]]:
    from pyint8.models.checks import has_expert_codes, has_fused_experts
    from pyint8.models.transformers.comparing import Comparison
    from pyint8.models.verifying import StoredBytes, Verifier

    assert request.config is not None
    request = replace(request, config=replace(request.config, experts=has_expert_codes(checkpoint)))
    with ExitStack() as stack:
        preparation = stack.enter_context(prepare(find_checkpoint(request.base, request.arguments), request.options))
        conversion = _conversion(request, preparation, recorder, fused_experts=has_fused_experts(checkpoint))
        comparison = Comparison(checkpoint, conversion)
        entries = [checkpoint[name] for name in comparison.order]
        stored = stack.enter_context(StoredBytes(entries, request.options, Recorder()))
        verifier = Verifier(checkpoint, stored)
        comparison.begin(verifier)
        conversion.run(comparison, (), devices_of(device), preparation, recorder)
        for name in comparison.left():
            verifier.check(name)
    return comparison, [*comparison.misfits(), *stored.errors, *verifier.problems]


def _conversion(request: LoadRequest, preparation: Any, recorder: Recorder, *, fused_experts: bool) -> Conversion:
    require_transformers()
    with importing:
        from pyint8.models.transformers.converting import Conversion
        from pyint8.models.transformers.loading import plan_pretrained
    model, load = plan_pretrained(request, preparation, recorder)
    return Conversion(model, load, "5GB", fused_experts=fused_experts)


def _request(path: str, source: str, options: StreamOptions, arguments: Mapping[str, Any]) -> LoadRequest:
    """The load that the checkpoint in `path` was made with, whatever its experts are."""
    from pyint8.models.request import LoadRequest, check_dtype

    described = configuration(path, arguments)
    stored = None if described is None else described[1].get(_QUANTIZATION)
    if described is None or not isinstance(stored, dict):
        raise OptionError(
            f"against is for int8 checkpoints of transformers models, and {path} has no config.json that says it is one"
        )
    if _is_int8(source, arguments):
        raise OptionError(f"against is {source}, which is int8 itself; give the 16- or 32-bit checkpoint")
    return LoadRequest(
        path=source,
        base=source,
        device_map={"": "cpu"},
        dtype=check_dtype(described[1].get("dtype") or described[1].get("torch_dtype") or "auto"),
        config=Int8Config(
            threshold=stored.get("llm_int8_threshold", 6.0),
            skip_modules=stored.get("llm_int8_skip_modules"),
        ),
        strict=False,
        options=options,
        arguments=arguments,
    )


def _is_int8(source: str, arguments: Mapping[str, Any]) -> bool:
    check_path(source, arguments, is_plain=False)
    described = configuration(source, arguments)
    return described is not None and bool(described[1].get(_QUANTIZATION))


def _findings(problems: list[Pyint8Error]) -> tuple[Finding, ...]:
    found = {
        Finding(url_of(error.problem), error.tensor, error.path and url_of(error.path), error.offset): None
        for error in problems
    }
    return tuple(sorted(found, key=lambda each: (each.path or "", each.offset or 0, each.tensor or "")))
