"""What several verbs do at their start."""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint.find import HUB_ARGUMENTS, find_checkpoint
from pyint8.config import StreamOptions
from pyint8.errors import OptionError, first_names
from pyint8.host import ending, garbage
from pyint8.host.imports import imported
from pyint8.host.memory import peak_resident_bytes
from pyint8.host.processes import processes
from pyint8.remote.urls import is_url, refuse_url
from pyint8.report import LoadReport, Recorder

if TYPE_CHECKING:
    import torch

    from pyint8.checkpoint import Checkpoint
    from pyint8.streaming.head_start import HeadStart
    from pyint8.streaming.preparation import Preparation
    from pyint8.streaming.ranks.ranks import Ranks

logger = logging.getLogger(__name__)


def decoded(path: Any) -> str:
    """A path as a string.

    Raises:
        OptionError: It is none.
    """
    try:
        return os.fsdecode(path)
    except TypeError:
        raise OptionError(f"path is {path!r}; it must be a folder or a hub id") from None


def decoded_folder(folder: Any) -> str:
    """The path of a folder to write, as a string.

    Raises:
        OptionError: It is none.
    """
    try:
        path = os.fsdecode(folder)
    except TypeError:
        raise OptionError(f"folder is {folder!r}; it must be the path of a folder") from None
    if not path:
        raise OptionError("folder is empty; it must be the path of a folder")
    refuse_url("folder", path)
    return path


def name_after(source: str, folder: str, model: Any) -> None:
    """Gives a model of transformers', and the models inside of it, the name of what the folder stood for."""
    for module in model.modules():
        for named in (module, getattr(module, "config", None)):
            if named is not None and getattr(named, "name_or_path", None) == folder:
                named.name_or_path = source


def is_of_transformers(model: object) -> bool:
    """Whether it is a model of transformers'."""
    transformers = imported("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def check_options(options: object) -> None:
    """Raises OptionError unless it is a StreamOptions or None."""
    if options is not None and not isinstance(options, StreamOptions):
        raise OptionError(f"options is {reprlib.repr(options)}; it must be a pyint8.StreamOptions or None")


def check_whereabouts(storage_options: object, arguments: Mapping[str, Any], *paths: str | None) -> None:
    """Raises OptionError for arguments about where checkpoints are that say nothing of any of the paths.

    Args:
        storage_options: For URLs: a mapping, or None.
        arguments: Of from_pretrained; those that are for the hub count, for any path that is no URL.
        paths: Of the checkpoints.
    """
    given = [path for path in paths if path is not None]
    hub = [name for name in HUB_ARGUMENTS if arguments.get(name) not in (None, False) and name != "subfolder"]
    if hub and all(map(is_url, given)):
        raise OptionError(
            f"{hub[0]} is for the hub, and the checkpoint is under a URL; for that there are storage_options"
        )
    if storage_options is None:
        return
    if not isinstance(storage_options, Mapping):
        raise OptionError("storage_options must be a dict, such as {'region': 'eu-west-1'}")  # its values may be secret
    if not any(map(is_url, given)):
        raise OptionError("storage_options are for URLs (s3://, gs://, az://, https://); leave them out")


def options_for(path: str, options: StreamOptions | None) -> StreamOptions:
    """How to move bytes: as given, or by the environment, with the defaults for where they are.

    Raises:
        OptionError: An option that is not for what is there.
    """
    options = StreamOptions.from_environment() if options is None else options
    return options.for_remote() if is_url(path) else options


@contextmanager
def located(path: str, arguments: Mapping[str, Any], storage_options: Mapping[str, Any] | None) -> Iterator[str]:
    """The path here of a checkpoint: for a URL, that of a folder that stands for it while the block lasts.

    Args:
        path: A folder, file, hub id or URL; all but the last are given back.
        arguments: Of from_pretrained: `subfolder`, `variant` and `use_safetensors` count.
        storage_options: For a URL.

    Raises:
        Pyint8Error: See `pyint8.remote.folder.opened`.
    """
    if not is_url(path):
        yield path
        return
    if arguments.get("use_safetensors") is False:
        raise OptionError(
            "use_safetensors=False asks for files of PyTorch's, which are not read from URLs; download it"
        )
    from pyint8.remote.folder import opened  # here, since `import pyint8` loads nothing that it may not need

    where = {name: arguments[name] for name in ("subfolder", "variant") if arguments.get(name) is not None}
    with opened(path, storage_options, **where) as here:
        yield here


@contextmanager
def begun(
    path: str,
    arguments: Mapping[str, Any],
    options: StreamOptions,
    *,
    progress: bool | None,
    opened: HeadStart | None = None,
) -> Iterator[tuple[Preparation, Recorder]]:
    """What begins before anything heavy is imported: bad folders fail at once, and the disk has something to do.

    Args:
        path: A folder or hub id.
        arguments: Where the checkpoint is found.
        options: How to move bytes.
        progress: Whether to show a bar.
        opened: See `prepare`.
    """
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(progress, timeline=options.timeline))
        stack.enter_context(ending.awaited(recorder))
        with garbage.paused(), recorder.phase("read headers"):
            checkpoint = find_checkpoint(path, arguments)
        yield stack.enter_context(prepare(checkpoint, options, opened=opened)), recorder


def prepare(
    checkpoint: Checkpoint | None,
    options: StreamOptions,
    ranks: Ranks | None = None,
    opened: HeadStart | None = None,
) -> Preparation:
    """What begins before anything heavy is imported (see `Preparation`)."""
    from pyint8.streaming.preparation import Preparation  # here, since `import pyint8` does not load the extension

    return Preparation(checkpoint, options, ranks, opened)


def opened_engine(
    stack: ExitStack, device_map: Any, options: StreamOptions, ranks: Ranks | None, *, is_bounded: bool
) -> HeadStart | None:
    """Opens an engine and pins its memory while headers are read, until the stack ends; a load may take it over.

    None where it would take longer than they do, as torch is not imported yet or has no context on a GPU, and where no
    GPU will be used, or it is not known which.

    Args:
        stack: Closes it, unless it was taken.
        device_map: Of the load.
        options: How to move bytes.
        ranks: Those that load together.
        is_bounded: Whether GPUs may use only a part of their memory.
    """
    torch = imported("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    from pyint8.placement.device_map import check_device_map
    from pyint8.streaming.first_tensors import open_head_start

    check_device_map(device_map)
    opened = open_head_start(device_map, options, ranks, is_bounded=is_bounded)
    if opened is not None:
        stack.callback(opened.close)
    return opened


def opened_engine_for(stack: ExitStack, devices: Iterable[torch.device], options: StreamOptions) -> HeadStart | None:
    """The same for the GPUs among some devices, which have contexts; None if there are none."""
    from pyint8.streaming.head_start import HeadStart

    gpus = sorted({device for device in devices if device.type == "cuda"}, key=str)
    if not gpus:
        return None
    opened = HeadStart(gpus, options, gpus=len(gpus))
    stack.callback(opened.close)
    return opened


def joined_ranks(stack: ExitStack, process_group: Any, device_map: Any, cache: Any) -> Ranks | None:
    """The ranks that load together, until the stack ends; whatever fails from now on is told to all of them."""
    if process_group is None:
        return None
    from pyint8.streaming.ranks.ranks import join_ranks  # with torch

    ranks = join_ranks(process_group)
    if ranks is not None:
        stack.enter_context(ranks)
        ranks.use(device_map)
    if cache is not False:
        raise OptionError(
            "cache and process_group do not go together: convert once, with pyint8.convert, and load that"
        )
    return ranks


def warn_of_own_values(ranks: Ranks | None, report: LoadReport) -> None:
    """Of weights that ranks which load together, if there are any, have each for itself."""
    missing = report.loading_info.get("missing_keys")
    if ranks is not None and missing:
        logger.warning(
            "not in the checkpoint, so each rank has its own values of %s: broadcast them from one rank to the others "
            "(DistributedDataParallel does, unless it is told init_sync=False)",
            first_names(sorted(missing)),
        )


def ranks_apart(stack: ExitStack, process_group: Any) -> Ranks | None:
    """The ranks that share work out, until the stack ends; whatever fails from now on is told to all of them."""
    if process_group is None:
        return None
    from pyint8.streaming.ranks.ranks import join_ranks  # with torch

    ranks = join_ranks(process_group)
    return ranks and stack.enter_context(ranks)


@contextmanager
def launched_group() -> Iterator[tuple[Any, int]]:
    """The process group of all processes that torchrun started with this one, None for one alone, and its rank.

    Raises:
        OptionError: There are several, and they do not know how to reach each other.
    """
    if processes().total == 1:
        yield None, 0
        return
    from pyint8.streaming.ranks.world import launched_group  # with torch

    with launched_group() as found:
        yield found


def device_of_rank(device: Any) -> torch.device:
    """As `devices_of`, for one process of many on a host: None and "cuda" are the GPU of its LOCAL_RANK."""
    import torch

    if device is None or str(device) == "cuda":
        return torch.device("cuda", processes().local_rank) if torch.cuda.is_available() else devices_of(device)[0]
    return devices_of(device)[0]


def devices_of(device: Any) -> list[torch.device]:
    """Where weights are quantized: None for all visible GPUs that can, or the CPU.

    Raises:
        OptionError: It is no device.
    """
    import torch

    from pyint8.quantizer import find_entry_point

    if device is None:
        count = torch.cuda.device_count() if find_entry_point() is not None else min(1, torch.cuda.device_count())
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(f'device is {device!r}; it must be "cpu", "cuda", "cuda:1" or the like, or None') from None
    if str(found) == "cuda":
        found = torch.device("cuda", torch.cuda.current_device())
    return [found]


@contextmanager
def measured_memory(report: LoadReport) -> Iterator[None]:
    """Fills in the report's peaks."""
    import torch

    before = peak_resident_bytes()
    if torch.cuda.is_initialized():  # otherwise its peak is zero anyway
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    yield
    report.host_peak_bytes = peak_resident_bytes() - before
    if torch.cuda.is_initialized():
        peaks = {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
        report.device_peak_bytes = {name: peak for name, peak in peaks.items() if peak}
