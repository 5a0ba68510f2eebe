"""`pyint8.load(..., cache=...)`: the int8 form of a checkpoint is made once, behind the first load, for all others."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.cache import CacheFolder, seal
from pyint8.checkpoint.find import FILE_ARGUMENTS
from pyint8.config import StreamOptions, cache_bytes, cache_folder
from pyint8.errors import CancelledError, OptionError, Pyint8Error
from pyint8.host.files import exists, is_folder
from pyint8.models.origin import remember_origin
from pyint8.operations.common import begun, devices_of, located, name_after
from pyint8.operations.wanted import Wanted
from pyint8.remote.urls import refuse_url
from pyint8.report import LoadReport

if TYPE_CHECKING:
    import torch

    from pyint8.models.request import LoadRequest

logger = logging.getLogger(__name__)

_fills: set[threading.Thread] = set()


class Cache:
    """The cache as one load sees it.

    Args:
        folder: Where it is; None where nothing is to be cached.
        wanted: What the load wants.
        checkpoint: The source, if it is here.
        path: What that was found by.
    """

    def __init__(self, folder: CacheFolder | None, wanted: Wanted, checkpoint: Checkpoint | None, path: str) -> None:
        self._folder = folder
        self._wanted = wanted
        self._checkpoint = checkpoint
        self._path = path

    @contextmanager
    def found(self) -> Iterator[Checkpoint | None]:
        """The int8 form, which stays while the block lasts; None if there is none."""
        if self._checkpoint is None or self._folder is None:
            yield None
            return
        with self._folder.opened(self._wanted.key(self._checkpoint, self._path)) as found:
            yield found

    @staticmethod
    def request_for(found: Checkpoint, request: LoadRequest) -> LoadRequest:
        """The same request, of the int8 form."""
        folder = os.path.dirname(found.files[0])
        behind = (*FILE_ARGUMENTS, "code_revision")  # of which it has the code
        arguments = {name: value for name, value in request.arguments.items() if name not in behind}
        return replace(request, path=folder, base=folder, config=None, arguments=arguments)

    def loaded(self, model: Any, found: Checkpoint | None, report: LoadReport) -> None:
        """Gives a model of the int8 form its own name, or has that form made."""
        if found is not None:
            report.from_cache = True
            name_after(self._wanted.source, os.path.dirname(found.files[0]), model)
            assert self._checkpoint is not None
            home = self._wanted.home(self._checkpoint, self._path)
            remember_origin(model, self._checkpoint.files, home)
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

        wanted, options = self._wanted, self._options
        with (
            located(wanted.source, wanted.arguments, wanted.storage_options) as source,
            begun(source, wanted.arguments, options, progress=False) as (preparation, recorder),
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
                key = wanted.key(preparation.checkpoint, source)

                def complete(staging: str) -> None:
                    _refuse_if_cached(folder, key)  # another process may have been faster, and loads may use its form
                    seal(staging, wanted.source)

                _refuse_if_cached(folder, key)
                write_converted(plan, folder.folder(key), devices, preparation, recorder, complete)

    @property
    def _options(self) -> StreamOptions:
        return replace(self._wanted.options, checksums=True)

    def _request(self, source: str, device: torch.device) -> LoadRequest:
        """Strict, and with checksums, in any case: the form is for all loads, and some of them may be."""
        from pyint8.operations.conversions import conversion_request

        wanted = self._wanted
        request = conversion_request(source, device, wanted.dtype, wanted.config, self._options, wanted.arguments)
        return replace(request, strict=True)


def refuse_cache(*, is_plain: bool, is_adapter: bool) -> None:
    """Raises OptionError for what is not cached."""
    if is_plain:
        raise OptionError("cache is for transformers models; save a module of your own with pyint8.save")
    if is_adapter:
        raise OptionError("cache is for models, not for adapters; load the base model with it, then the adapter")


def cache_of(where: Any, wanted: Wanted, checkpoint: Checkpoint | None, path: str) -> Cache:
    """The cache for a load; where it is of no use, with a warning that says why.

    Args:
        where: A folder, or True for the user's.
        wanted: What the load wants.
        checkpoint: The source, if it is here.
        path: What that was found by.

    Raises:
        OptionError: `where` is no folder.
    """
    folder = opened_folder(where)
    why_not = wanted.why_not(checkpoint, path)
    if why_not is not None:
        logger.warning("%s is not cached: %s", wanted.source, why_not)
    return Cache(None if why_not else folder, wanted, checkpoint, path)


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
