"""The state of one load of a transformers model, from the checkpoint's headers to the last parameter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint, checkpoint_of_files
from pyint8.checkpoint.find import fetch_checksums
from pyint8.config import StreamOptions
from pyint8.models.origin import remember_origin
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.compat import SkipParameters, may_leave_parameters_out
from pyint8.models.transformers.initialization import NoInitializationOnMeta
from pyint8.models.transformers.planned import PlannedLoad
from pyint8.placement.device_map import check_entries
from pyint8.quantizer import Int8Quantizer
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.ranks.ranks import Ranks

_active: ContextVar[LoadSession | None] = ContextVar("pyint8_load_session", default=None)


class LoadSession:
    """One load.

    transformers' hooks come in this order: the files (`open_files`), the model on meta (`model_is_built`), its
    conversions (`set_conversions`), every target (`make`), the end (`finish`). The device map (`set_device_map`) comes
    before the conversions if it was given, after them if it had to be planned, and not at all for one device. The
    stream starts as soon as both are known, at the latest with the first target.

    Args:
        request: What was asked for.
        preparation: What the load has started already; closed by the caller.
        recorder: Its report gets everything.

    Attributes:
        request: As given.
        recorder: As given.
        device_map: Modules to devices, once transformers has decided.
        planned: The load with its plan, once transformers has given its conversions.
        on_files: Called when transformers has all files, before it builds the model.
        on_start: Called when the stream has started.
    """

    planned: PlannedLoad | None = None  # `close` reads it, also where `__init__` was interrupted

    def __init__(self, request: LoadRequest, preparation: Preparation, recorder: Recorder) -> None:
        self.request = request
        self.recorder = recorder
        self.on_files: Callable[[], object] = lambda: None
        self.on_start: Callable[[], object] = lambda: None
        self._preparation = preparation
        self._checkpoint: Checkpoint | None = preparation.checkpoint
        self.device_map: Mapping[str, Any] | None = None
        self._building = NoInitializationOnMeta()
        self._made_at = time.perf_counter()

    @staticmethod
    def for_drop_in(*, strict: bool) -> LoadSession:
        """The session of a from_pretrained outside of `pyint8.load`; `PYINT8_*` variables are its options."""
        request = LoadRequest(
            strict=strict, options=StreamOptions.from_environment(), arguments={"ignore_mismatched_sizes": True}
        )
        recorder = Recorder(timeline=request.options.timeline)
        return LoadSession(request, Preparation(None, request.options, Ranks.of_block()), recorder)

    @staticmethod
    def active() -> LoadSession | None:
        """The session of the `pyint8.load` that is running in this context."""
        return _active.get()

    @property
    def is_drop_in(self) -> bool:
        """Whether it is a from_pretrained of other code, not one within `pyint8.load`."""
        return _active.get() is not self

    def check_device_map(self, device_map: Any) -> None:
        """Raises OptionError for a device map that ranks cannot load together with, if there are any."""
        if self._preparation.ranks is not None:
            self._preparation.ranks.use(device_map)

    @property
    def reserves_memory(self) -> bool:
        """Whether the GPUs' memory is reserved by the load itself: once the stream has started."""
        return self.planned is not None and self.planned.has_started

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Makes this the session that transformers' quantizer finds; closes it at the end."""
        before = _active.get()
        try:
            try:
                _active.set(self)
                self._building.__enter__()  # type: ignore[no-untyped-call]
                yield
            finally:
                self._deactivate(before)
        finally:  # again: Ctrl-C may have come in between
            self._deactivate(before)

    def _deactivate(self, before: LoadSession | None) -> None:
        """Idempotent."""
        self.model_is_built()
        _active.set(before)
        self.close()

    def model_is_built(self) -> None:
        """Called when all modules are made, on meta; from now on tensors are real."""
        self._building.end()

    def open_files(self, files: Sequence[str]) -> None:
        """Takes the files that transformers resolved; reads headers again only if files are others, or have changed."""
        self.on_files()
        known = self._checkpoint
        if known is None or set(known.files) != set(files) or known.has_changed:
            with self.recorder.phase("read headers"):
                fetch_checksums(files, self.request.base, self.request.arguments)
                self._checkpoint = checkpoint_of_files(files)

    @property
    def checkpoint(self) -> Checkpoint:
        """The files that transformers resolved."""
        assert self._checkpoint is not None
        return self._checkpoint

    def set_conversions(
        self, model: Any, conversions: list[Any], dtype: torch.dtype, quantizer: Int8Quantizer
    ) -> PlannedLoad:
        """Takes transformers' conversions; decides what every tensor is for, and which modules are put back.

        Raises:
            PlacementError: The device map that was given leaves parameters out (see `check_entries`).
            Pyint8Error: Another; see `PlannedLoad`.
        """
        assert self._checkpoint is not None
        self.model_is_built()  # again: now the contexts in which transformers built it have ended
        remember_origin(model, self._checkpoint.files)
        if self.device_map is not None:
            check_entries(model, self.device_map, are_all=not may_leave_parameters_out(model))
        self.planned = PlannedLoad(model, self._checkpoint, conversions, dtype, quantizer, self.request)
        if self.device_map is not None:
            self._start(self.planned)
        return self.planned

    def plan_is_made(self, model: Any, quantizer: Any) -> None:
        """Called once everything is decided that a planned device map depends on, with transformers' quantizer."""

    def set_device_map(self, device_map: Mapping[str, Any]) -> None:
        """Takes the device map that transformers has decided on."""
        self.device_map = device_map
        if self.planned is not None:
            self._start(self.planned)

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        """The parameters of one target, by name; called by transformers' loop."""
        assert self.planned is not None
        self._start(self.planned)
        try:
            return self.planned.make(name, loading_info)
        except SkipParameters:  # a conversion failed; transformers records it and goes on
            raise
        except BaseException:
            self.close()
            raise

    def _start(self, planned: PlannedLoad) -> None:
        """Starts the stream, unless it has started."""
        if planned.has_started:
            return
        if self.is_drop_in:  # from_pretrained started before the session was made
            headers = self.recorder.report.seconds["read headers"]
            self.recorder.add_seconds("build", time.perf_counter() - self._made_at - headers)
        planned.start(self.device_map, self._preparation, self.recorder)
        self.on_start()

    def finish(self) -> None:
        """Waits for the last byte of the last parameter, and closes.

        transformers reads the files too, by their paths: names before the stream, tensors left on the disk later.

        Raises:
            FileChangedError: A path no longer leads to the file whose header was read.
            Pyint8Error: The error that stopped the stream.
        """
        assert self._checkpoint is not None
        try:
            if self.planned is not None:
                self.planned.finish()
        finally:
            self.close()
        self._checkpoint.require_unchanged(self._checkpoint.files)

    def close(self) -> None:
        """Gives back threads, files and memory."""
        if self.planned is not None and self.planned.has_started:
            self.recorder.add_seconds("stream", self.planned.close())

    def __del__(self) -> None:
        self.close()  # a drop-in load that is interrupted has no other owner


class PlanningSession(LoadSession):
    """A load that reads nothing: what the checkpoint has for the model stands in it on meta, without values.

    Attributes:
        place: Called with the model and transformers' quantizer when a device map would be planned.
    """

    place: Callable[[Any, Any], object] | None = None
    _is_placing = False

    @property
    def reserves_memory(self) -> bool:
        """That no memory is needed has the same effect."""
        return not self._is_placing

    def plan_is_made(self, model: Any, quantizer: Any) -> None:
        if self.place is None:
            return
        self._is_placing = True
        try:
            self.place(model, quantizer)
        finally:
            self._is_placing = False

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        assert self.planned is not None
        return self.planned.stand_ins(name)

    def _start(self, planned: PlannedLoad) -> None:
        self.on_start()
