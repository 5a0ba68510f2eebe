"""`pyint8.load(..., cache=...)`: the int8 form of a checkpoint is made once, behind the first load, for all others."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.cache import CacheFolder, seal
from pyint8.checkpoint.find import HUB_ARGUMENTS
from pyint8.checkpoint.identity import digest, identity_of
from pyint8.config import Int8Config, StreamOptions, cache_bytes, cache_folder
from pyint8.errors import CancelledError, OptionError, Pyint8Error
from pyint8.host.files import exists, is_folder, open_file
from pyint8.operations.common import begun, devices_of, located, name_after
from pyint8.remote.objects import tag_of
from pyint8.remote.urls import refuse_url
from pyint8.report import LoadReport

if TYPE_CHECKING:
    import torch

    from pyint8.models.request import LoadRequest

logger = logging.getLogger(__name__)

# Of `from_pretrained`: where files are found, which the int8 form has behind it.
_FINDING = frozenset({*HUB_ARGUMENTS, "variant", "use_safetensors", "code_revision"})
# What changes which tensor is which, in a way that the int8 form has behind it.
_UNFIT = ("key_mapping", "state_dict", "gguf_file", "ignore_mismatched_sizes", "num_labels", "id2label")

_CONFIGURATIONS = ("config.json", "generation_config.json")

_fills: set[threading.Thread] = set()


@dataclass(frozen=True)
class Wanted:
    """What decides which int8 form is the right one: the arguments of a load.

    Attributes:
        source: The folder or hub id of the model.
        device_map: Where modules go.
        dtype: Of what is not quantized, and on the way to int8.
        config: What to quantize.
        model_class: A transformers class, or None for the one that the configuration names.
        arguments: Of `from_pretrained`.
        options: How to move bytes.
        storage_options: For a source that is a URL.
    """

    source: str
    device_map: Any
    dtype: Any
    config: Int8Config | None
    model_class: Any
    arguments: Mapping[str, Any]
    options: StreamOptions
    storage_options: Mapping[str, Any] | None = None

    def key(self, checkpoint: Checkpoint) -> str:
        """Its name in the cache: another one for whatever makes it another."""
        from pyint8.models.request import check_dtype

        config = self.config or Int8Config()
        described = [
            identity_of(checkpoint, tag_of),
            _descriptions(os.path.dirname(checkpoint.files[0])),
            self.device,
            str(check_dtype(self.dtype)),
            {name: value for name, value in asdict(config).items() if name != "strict"},
            None if self.model_class is None else f"{self.model_class.__module__}.{self.model_class.__qualname__}",
            [version(name) for name in ("pyint8", "bitsandbytes")],
        ]
        name = os.path.basename(os.path.normpath(self.source)) or "model"
        return f"{name}-{digest(described)[:16]}"

    @cached_property
    def device(self) -> str | None:
        """Where weights are quantized: "cuda", "cpu", or None for a mixture, or another kind."""
        import torch

        from pyint8.placement.device_map import check_device_map, is_planned

        check_device_map(self.device_map)
        if self.device_map is None or is_planned(self.device_map):
            return "cuda" if torch.cuda.is_available() else "cpu"
        devices = self.device_map.values() if isinstance(self.device_map, Mapping) else [self.device_map]
        kinds = {"disk" if each == "disk" else torch.device(each).type for each in devices}
        kind = kinds.pop() if len(kinds) == 1 else None
        return kind if kind in ("cuda", "cpu") else None

    def why_not(self, checkpoint: Checkpoint | None) -> str | None:
        """What keeps it from the cache, if anything does."""
        unfit = [name for name in _UNFIT if self.arguments.get(name) is not None]
        if unfit:
            return f"{unfit[0]} makes another model of the checkpoint"
        if self.config is not None and self.config.has_fp16_weight:
            return "has_fp16_weight keeps weights in 16 bit"
        if self.device is None or (self.config is not None and self.config.fp32_cpu_offload):
            return "the model is spread over several kinds of devices"
        if checkpoint is not None and checkpoint.has_codes:
            return "the checkpoint is int8 already"
        return None


class Cache:
    """The cache as one load sees it.

    Args:
        folder: Where it is; None where nothing is to be cached.
        wanted: What the load wants.
        checkpoint: The source, if it is here.
    """

    def __init__(self, folder: CacheFolder | None, wanted: Wanted, checkpoint: Checkpoint | None) -> None:
        self._folder = folder
        self._wanted = wanted
        self._checkpoint = checkpoint

    @contextmanager
    def found(self) -> Iterator[Checkpoint | None]:
        """The int8 form, which stays while the block lasts; None if there is none."""
        if self._checkpoint is None or self._folder is None:
            yield None
            return
        with self._folder.opened(self._wanted.key(self._checkpoint)) as found:
            yield found

    @staticmethod
    def request_for(found: Checkpoint, request: LoadRequest) -> LoadRequest:
        """The same request, of the int8 form."""
        folder = os.path.dirname(found.files[0])
        arguments = {name: value for name, value in request.arguments.items() if name not in _FINDING}
        return replace(request, path=folder, base=folder, config=None, arguments=arguments)

    def loaded(self, model: Any, found: Checkpoint | None, report: LoadReport) -> None:
        """Gives a model of the int8 form its own name, or has that form made."""
        if found is not None:
            report.from_cache = True
            name_after(self._wanted.source, os.path.dirname(found.files[0]), model)
        elif self._folder is not None:
            self.fill(self._folder)

    def fill(self, folder: CacheFolder) -> None:
        """Makes the int8 form, on a thread, which stops when the interpreter ends; the next load continues it."""
        thread = threading.Thread(target=self._fill, args=(folder,), name="pyint8 cache", daemon=True)
        _fills.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            _fills.discard(thread)
            logger.warning("the int8 form of %s is not cached: %s", self._wanted.source, error)

    def _fill(self, folder: CacheFolder) -> None:
        source = self._wanted.source
        try:
            self._make(folder)
            logger.info("the int8 form of %s is cached", source)
        except _AlreadyCachedError:
            logger.info("the int8 form of %s was cached by another process", source)
        except CancelledError:
            logger.info("the int8 form of %s is not cached yet; the next load continues", source)
        except Exception as error:  # the load, which has ended, is none the worse for it
            reason = str(error) if isinstance(error, (Pyint8Error, OSError)) else repr(error)
            logger.warning("the int8 form of %s is not cached: %s", source, reason)
        finally:
            _fills.discard(threading.current_thread())

    def _make(self, folder: CacheFolder) -> None:
        from pyint8.operations.conversions import plan_conversion, write_converted

        wanted = self._wanted
        with (
            located(wanted.source, wanted.arguments, wanted.storage_options) as source,
            begun(source, wanted.arguments, wanted.options, progress=False) as (preparation, recorder),
        ):
            if preparation.checkpoint is None:
                raise OptionError("its files are not here")
            devices = devices_of(None if wanted.device == "cuda" else "cpu")
            with _beside(devices[0]):
                request = self._request(source, devices[0])
                plan = plan_conversion(wanted.model_class, request, "5GB", preparation, recorder, fused_experts=True)
                _refuse_fresh(recorder.report)
                nbytes = plan.conversion.shards.total_bytes
                if not folder.make_room(nbytes):
                    raise OptionError(f"it takes {nbytes / 1e9:.1f} GB, more than the cache may (PYINT8_CACHE_BYTES)")
                key = wanted.key(preparation.checkpoint)

                def complete(staging: str) -> None:
                    _refuse_if_cached(folder, key)  # another process may have been faster, and loads may use its form
                    seal(staging, wanted.source)

                _refuse_if_cached(folder, key)
                write_converted(plan, folder.folder(key), devices, preparation, recorder, complete)

    def _request(self, source: str, device: torch.device) -> LoadRequest:
        """Strict in any case: the form is for all loads, and some of them may be."""
        from pyint8.operations.conversions import conversion_request

        wanted = self._wanted
        request = conversion_request(source, device, wanted.dtype, wanted.config, wanted.options, wanted.arguments)
        return replace(request, strict=True)


def cache_of(where: Any, wanted: Wanted, checkpoint: Checkpoint | None) -> Cache:
    """The cache for a load; where it is of no use, with a warning that says why.

    Args:
        where: A folder, or True for the user's.
        wanted: What the load wants.
        checkpoint: The source, if it is here.

    Raises:
        OptionError: `where` is no folder.
    """
    folder = opened_folder(where)
    why_not = wanted.why_not(checkpoint)
    if why_not is not None:
        logger.warning("%s is not cached: %s", wanted.source, why_not)
    return Cache(None if why_not else folder, wanted, checkpoint)


def opened_folder(where: Any = True) -> CacheFolder:
    """The cache in a folder, or for True the user's.

    Raises:
        OptionError: It is no folder.
    """
    if where is True:
        return CacheFolder(cache_folder(), cache_bytes())
    try:
        path = os.fsdecode(where)
    except TypeError:
        raise OptionError(f"cache is {where!r}; it must be True, False, or the path of a folder") from None
    refuse_url("cache", path)
    if not path or (exists(path, follow=False) and not is_folder(path)):
        raise OptionError(f"cache is {path!r}, which is no folder; give the path of one, or of a new one")
    return CacheFolder(path, cache_bytes())


def wait_for_fills(timeout: float | None = None) -> bool:
    """Waits for what loads of this process left to be made in the cache.

    Args:
        timeout: Seconds to wait for each.

    Returns:
        Whether all has ended.
    """
    for thread in list(_fills):
        thread.join(timeout)
    return not any(thread.is_alive() for thread in _fills)


def _refuse_fresh(report: LoadReport) -> None:
    """Of weights that the checkpoint lacks, which each load draws anew."""
    missing = report.loading_info.get("missing_keys")
    if missing:
        raise OptionError(f"the checkpoint has no values for {min(missing)}, which each load draws anew")


class _AlreadyCachedError(Exception):
    """What was to be made is there."""


def _refuse_if_cached(folder: CacheFolder, key: str) -> None:
    with folder.opened(key) as found:
        if found is not None:
            raise _AlreadyCachedError


def _beside(device: torch.device) -> Any:
    """A stream of its own, so that whoever uses the model does not wait for it."""
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _descriptions(folder: str) -> dict[str, str]:
    """Digests of what describes the model: its configurations and its code."""
    names = sorted(name for name in os.listdir(folder) if name in _CONFIGURATIONS or name.endswith(".py"))
    found = {}
    for name in names:
        with open_file(os.path.join(folder, name)) as file:
            found[name] = digest(file.read().decode(errors="replace"))
    return found
