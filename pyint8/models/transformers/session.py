"""What one load of a transformers model knows, from the checkpoint's headers to the last parameter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.core_model_loading import SkipParameters

from pyint8.checkpoint import checkpoint_of_files
from pyint8.config import StreamOptions
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.initialization import NoInitializationOnMeta
from pyint8.models.transformers.parameters import ParameterMaker, find_dtypes, find_places
from pyint8.models.transformers.plan import LoadPlan, make_plan
from pyint8.models.transformers.settle import check_tensors, judge_disagreements, settle_modules
from pyint8.quantizer import Int8Quantizer
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation

_active: ContextVar[LoadSession | None] = ContextVar("pyint8_load_session", default=None)


class LoadSession:
    """One load.

    Args:
        request: What was asked for.
        preparation: What is under way already; whoever made it closes it.
        recorder: Told of all that happens.

    Attributes:
        request: As given.
        recorder: As given.
        quantizer: Set when transformers constructs its quantizer.
        device_map: Modules to devices, once transformers has decided.
        plan: What every tensor is for, once transformers has said how it renames.
        dtypes: What each parameter is loaded as, or quantized from; from then on too.
        is_planned: Whether it has.
        on_files: Called when transformers has all files, and begins to build.
        on_start: Called when the stream has started.
    """

    def __init__(self, request: LoadRequest, preparation: Preparation, recorder: Recorder) -> None:
        self._maker: ParameterMaker | None = None  # first: `close` looks at it
        self.request = request
        self.recorder = recorder
        self.quantizer: Int8Quantizer
        self.device_map: Mapping[str, Any] | None = None
        self._preparation = preparation
        self.plan: LoadPlan
        self.dtypes: dict[str, torch.dtype]
        self.is_planned = False
        self.on_files: Callable[[], object] = lambda: None
        self.on_start: Callable[[], object] = lambda: None
        self._checkpoint = preparation.checkpoint
        self._building = NoInitializationOnMeta()
        self._made_at = time.perf_counter()

    @staticmethod
    def of_other_code(*, strict: bool) -> LoadSession:
        """The session of a from_pretrained that is not within `pyint8.load`; `PYINT8_*` variables are its options."""
        request = LoadRequest(
            strict=strict, options=StreamOptions.from_environment(), arguments={"ignore_mismatched_sizes": True}
        )
        return LoadSession(request, Preparation(None, request.options), Recorder())

    @property
    def is_drop_in(self) -> bool:
        """Whether it is a from_pretrained of other code, instead of one within `pyint8.load`."""
        return _active.get() is not self

    @property
    def reserves_memory(self) -> bool:
        """Whether the memory of the GPU was seen to, and tensors lie in it already: once the stream has started."""
        return self._maker is not None and self._preparation.reserves_memory

    @staticmethod
    def active() -> LoadSession | None:
        """The session of the `pyint8.load` that is under way in this context."""
        return _active.get()

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Makes this the session that transformers' quantizer finds; closes it at the end."""
        token = _active.set(self)
        self._building.__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.model_is_built()
            _active.reset(token)
            self.close()

    def model_is_built(self) -> None:
        """Its modules are all there, on meta; from now on tensors are real."""
        self._building.end()

    def __del__(self) -> None:
        self.close()  # a from_pretrained of somebody else that was interrupted has nobody else to do so

    def close(self) -> None:
        """Gives back threads, files and memory."""
        if self._maker is not None:
            self._maker.close()
            self._maker = None
            self.recorder.add_seconds("stream", time.perf_counter() - self._stream_start)

    def finish(self) -> None:
        """Closes, after the last parameter.

        transformers reads the files too, by their paths: names before the stream, and later what is left on the disk.

        Raises:
            FileChangedError: A file is not the one any more whose header was read.
        """
        assert self._checkpoint is not None
        self.close()
        self._checkpoint.require_unchanged(self._checkpoint.files)

    def open_files(self, files: Sequence[str]) -> None:
        """The files that transformers resolved; read again only if they are not those opened before, as they were."""
        self.on_files()
        known = self._checkpoint
        if known is None or set(known.files) != set(files) or known.has_changed:
            with self.recorder.phase("read headers"):
                self._checkpoint = checkpoint_of_files(files)

    def make_plan(self, model: Any, conversions: list[Any], dtype: torch.dtype) -> LoadPlan:
        """Decides what every tensor is for, and which of the replaced modules are put back.

        Raises:
            Pyint8Error: See `settle` for tensors that have no good place, `start` for the stream.
        """
        assert self._checkpoint is not None
        self.model_is_built()  # and transformers has left the contexts in which it built it
        self._model, self._dtype = model, dtype
        parameters = model.state_dict()
        self.plan = make_plan(
            self._checkpoint,
            conversions,
            model.base_model_prefix,
            parameters,
            pre_quantized=self.quantizer.pre_quantized,
        )
        allow = self.request.allows_mismatched_shapes
        strict = self.request.strict
        judge_disagreements(self.plan, model, self._checkpoint, strict=strict, allow_mismatched_shapes=allow)
        if settle_modules(
            self.plan, model, parameters, self._checkpoint, self.quantizer, allow_mismatched_shapes=allow
        ):
            parameters = model.state_dict()
        check_tensors(self.plan, parameters, self._checkpoint, self.quantizer, allow_mismatched_shapes=allow)
        self.dtypes = find_dtypes(model, parameters, dtype, self.quantizer)
        self.is_planned = True
        if self.device_map is not None:
            self.start()
        return self.plan

    def see_device_map(self, device_map: Mapping[str, Any]) -> None:
        """What transformers has decided: before the plan where it was asked for, after it where it had to be made."""
        self.device_map = device_map
        if self.is_planned and self._maker is None:
            self.start()

    def conversion_bytes(self) -> int:
        """What the largest conversion (a merge of experts) may take on a GPU beside what it makes, while it lasts."""
        assert self._checkpoint is not None
        sources = (
            sum(self._checkpoint[name].numel for name, _ in target.sources)
            for target in self.plan.targets.values()
            if target.converter is not None and not getattr(target.converter, "force_cpu", False)
        )
        # The sources, and once more as much on the way, where they are first stacked, then concatenated.
        return 2 * self._dtype.itemsize * max(sources, default=0)

    def locate(self, name: str) -> dict[str, Any]:
        """Where a parameter's (or a checkpoint's) tensor lies, for errors: "tensor", "path" and "offset"."""
        assert self._checkpoint is not None
        target = self.plan.made_by().get(name)
        source = target.sources[0][0] if target is not None and target.sources else name
        return self._checkpoint[source].place if source in self._checkpoint else {"tensor": name}

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        """The parameters of one target; called by transformers' loop."""
        if self._maker is None:
            self.start()
        assert self._maker is not None
        try:
            return self._maker.make(name, loading_info)
        except SkipParameters:  # a conversion failed; transformers notes it and goes on
            raise
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Starts the stream, once plan and device map are there.

        Raises:
            Pyint8Error: See `TensorStream`.
        """
        assert self._checkpoint is not None
        self._stream_start = time.perf_counter()
        if self.is_drop_in:
            headers = self.recorder.report.seconds["read headers"]
            self.recorder.add_seconds("build", self._stream_start - self._made_at - headers)
        self._preparation.stop_prefetch()
        self._maker = ParameterMaker(
            self.plan,
            self._model,
            self._checkpoint,
            find_places(self.plan, self.dtypes, self.device_map),
            self.quantizer,
            self.recorder,
            self._preparation,
        )
        self.on_start()
