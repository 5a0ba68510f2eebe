"""What `pyint8.convert` and the cache of loads do: an int8 form, planned, and written to a folder."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pyint8 import errors
from pyint8.checkpoint.identity import digest, identity_of, versions
from pyint8.checkpoint.journal import Journal
from pyint8.checkpoint.journals import gathered, journal_file, remove_all, remove_others
from pyint8.checkpoint.replacement import emptied_unless, replaced_folder
from pyint8.checkpoint.side_files import is_of_a_save
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import CancelledError, OptionError, RankError, ReadError
from pyint8.remote.objects import tag_of
from pyint8.report import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from pyint8.models.converted_files import ConvertedFiles
    from pyint8.models.request import LoadRequest
    from pyint8.models.transformers.converting import Conversion
    from pyint8.models.transformers.planned import PlannedLoad
    from pyint8.streaming.preparation import Preparation


class ConversionPlan(NamedTuple):
    """A conversion that can begin."""

    request: LoadRequest
    model: Any
    load: PlannedLoad
    conversion: Conversion
    checksums: bool = False


def plan_conversion(
    model_class: Any,
    request: LoadRequest,
    max_shard_size: int | str,
    preparation: Preparation,
    recorder: Recorder,
    *,
    fused_experts: bool,
) -> ConversionPlan:
    """Everything about a conversion, before a tensor is read.

    Args:
        model_class: A transformers class, or None for the one that the configuration names.
        request: What is converted, to the device that its map names.
        max_shard_size: Of one file.
        preparation: What has begun already.
        recorder: Told of phases.
        fused_experts: Whether int8 experts, if there are any, are written whole.

    Raises:
        Pyint8Error: It cannot be converted.
    """
    from pyint8.models.transformers.converting import Conversion
    from pyint8.models.transformers.loading import plan_pretrained

    model, load = plan_pretrained(request, preparation, recorder, model_class=model_class)
    conversion = Conversion(model, load, max_shard_size, fused_experts=fused_experts)
    return ConversionPlan(request, model, load, conversion)


def write_converted(
    plan: ConversionPlan,
    target: str,
    devices: Sequence[torch.device],
    preparation: Preparation,
    recorder: Recorder,
    complete: Callable[[str], None],
) -> None:
    """Writes weights and configurations to a folder, which is as it was until all is there.

    Args:
        plan: What to write.
        target: The folder.
        devices: Where weights are quantized.
        preparation: What has begun already.
        recorder: Told of bytes and phases.
        complete: Adds to the finished folder whatever else belongs there.

    Raises:
        Pyint8Error: A tensor cannot be read, quantized or written.
    """
    identity, checkpoint = identity_of_work(plan, devices[0]), plan.load.checkpoint
    with staged(target, identity, recorder) as (staging, noted):
        with (
            Journal(journal_file(staging), identity, noted) as journal,
            files_of(plan, staging, journal) as files,
        ):
            plan.conversion.run(files, journal.done, devices, preparation, recorder)
            files.finish()
            files.write_index(files.checksums)
        checkpoint.require_unchanged(checkpoint.files)
        completed(plan, staging, complete)


@contextmanager
def staged(target: str, identity: str, recorder: Recorder) -> Iterator[tuple[str, dict[str, int | None]]]:
    """The folder to write to, which then takes the place of `target`, and what is there of an earlier attempt.

    Args:
        target: The folder in the end.
        identity: Of the work.
        recorder: Told of the phase.

    Raises:
        OptionError: Another process is writing it.
    """
    with replaced_folder(target, is_of_a_save, is_resumed=_is_resumed) as staging, recorder.phase("stream"):
        try:
            found = gathered(staging, identity)
        except BlockingIOError:
            raise OptionError(
                f"another process, a rank of an earlier attempt, is writing {target}; wait for it, or end it"
            ) from None
        emptied_unless(staging, found is not None)
        noted = found or {}
        with Journal(journal_file(staging), identity, noted):
            remove_others(staging)
        yield staging, noted


def completed(plan: ConversionPlan, staging: str, complete: Callable[[str], None]) -> None:
    """Adds what lies beside the weights, and takes away what only the writing needed."""
    from pyint8.models.transformers.saving import write_description

    write_description(plan.model, staging)
    complete(staging)
    remove_all(staging)


def files_of(
    plan: ConversionPlan, staging: str, journal: Journal, others: frozenset[str] = frozenset()
) -> ConvertedFiles:
    """The files to write, without those that hold the tensors `others`."""
    from pyint8.models.converted_files import ConvertedFiles

    made, checksums = plan.conversion, plan.checksums
    return ConvertedFiles(staging, made.shards, journal, made.num_parameters, checksums=checksums, others=others)


def conversion_request(
    path: str,
    device: torch.device,
    dtype: Any,
    config: Int8Config | None,
    options: StreamOptions,
    arguments: Mapping[str, Any],
) -> LoadRequest:
    """What `plan_conversion` takes.

    Args:
        path: A folder or hub id.
        device: Where the first weight is quantized.
        dtype: As in `pyint8.load`.
        config: What to quantize.
        options: How to move bytes.
        arguments: For `from_pretrained`.

    Raises:
        OptionError: `dtype` is none.
    """
    from pyint8.models.request import LoadRequest, check_dtype

    return LoadRequest(
        path=path,
        base=path,
        device_map={"": device},
        dtype=check_dtype(dtype),
        config=config,
        strict=config is None or config.strict,
        options=options,
        arguments=arguments,
    )


def identity_of_work(plan: ConversionPlan, device: torch.device) -> str:
    """What makes the result of the work another."""
    files = {name: [str(tensor) for tensor in tensors] for name, tensors in plan.conversion.shards.files.items()}
    source = identity_of(plan.load.checkpoint, tag_of)
    checks = [plan.request.strict, plan.request.options.checksums]  # what is done has passed them
    return digest([source, files, device.type, plan.request.dtype, plan.checksums, checks, versions()])


def _is_resumed(error: BaseException) -> bool:
    """Whether what was written is of use after an error: of an interruption, or of storage that may be there again."""
    if not isinstance(error, RankError):
        return not isinstance(error, Exception) or isinstance(error, (ReadError, CancelledError))
    of_rank = getattr(errors, error.kind or "", getattr(builtins, error.kind or "", None))
    return of_rank is None or not issubclass(of_rank, Exception) or issubclass(of_rank, (ReadError, CancelledError))
