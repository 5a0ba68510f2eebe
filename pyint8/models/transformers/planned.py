"""A load that has a plan; its stream starts once the device map is known."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint
from pyint8.models.assembly import Destination
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.compat import WeightTransform, converts_on_cpu, looks_at_values
from pyint8.models.transformers.fusion import to_revert
from pyint8.models.transformers.parameters import ParameterMaker, find_destinations, find_dtypes
from pyint8.models.transformers.plan import plan_load
from pyint8.models.transformers.reconcile import check_index, reconcile
from pyint8.quantizer import EXPERT_SCALES, Int8Quantizer, WeightHealth, stand_in
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.reading import are_alike, is_same


class PlannedLoad:
    """One load, from transformers' conversions to the last parameter.

    Args:
        model: On meta, its linear modules replaced; those whose weight is absent or unsuitable are put back.
        checkpoint: The checkpoint to load.
        conversions: transformers' own renamings and converters for the model.
        dtype: Of the model.
        quantizer: Makes int8 parameters.
        request: What was asked for.

    Attributes:
        checkpoint: As given.
        plan: What every tensor is for.
        dtypes: The dtype that each parameter is loaded as, or quantized from.

    Raises:
        Pyint8Error: See `check_index` and `reconcile`.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        conversions: list[WeightTransform],
        dtype: torch.dtype,
        quantizer: Int8Quantizer,
        request: LoadRequest,
    ) -> None:
        self._maker: ParameterMaker | None = None
        self._model, self.checkpoint, self._dtype, self._quantizer = model, checkpoint, dtype, quantizer
        self._conversions = conversions
        prefix, keys = model.base_model_prefix, model.state_dict()
        self.plan = plan_load(checkpoint, conversions, prefix, keys, pre_quantized=quantizer.pre_quantized)
        allow = request.allows_mismatched_shapes
        check_index(self.plan, model, checkpoint, strict=request.strict, allow_mismatched_shapes=allow)
        parameters = reconcile(self.plan, model, checkpoint, quantizer, allow_mismatched_shapes=allow)
        self.dtypes = find_dtypes(model, parameters, dtype, quantizer)
        self._started_at = 0.0
        self._to_make = set(self.plan.targets)

    def of(self, checkpoint: Checkpoint) -> PlannedLoad:
        """The same load of another checkpoint, whose tensors have the same names, shapes and dtypes."""
        other = copy.copy(self)
        other.checkpoint, other._quantizer = checkpoint, copy.copy(self._quantizer)
        other._quantizer.health = WeightHealth()  # that knows nothing of values seen so far
        return other

    @property
    def has_started(self) -> bool:
        return self._maker is not None

    def start(self, device_map: Mapping[str, Any] | None, preparation: Preparation, recorder: Recorder) -> None:
        """Starts the stream.

        Args:
            device_map: Modules to devices; None for one device.
            preparation: What the load has started already.
            recorder: Counts bytes and parameters.

        Raises:
            Pyint8Error: See `TensorStream`.
        """
        self._started_at = time.perf_counter()
        preparation.stop_prefetch()
        self._maker = ParameterMaker(
            self.plan,
            self._model,
            self.checkpoint,
            find_destinations(self.plan, self.dtypes, device_map),
            self._quantizer,
            recorder,
            preparation,
        )

    def maker_of(
        self,
        names: Collection[str],
        destinations: dict[str, Destination],
        preparation: Preparation,
        recorder: Recorder,
        most_bytes: int,
    ) -> ParameterMaker:
        """What makes the parameters of some targets, a few at a time; the caller closes it.

        Args:
            names: The targets'.
            destinations: Where their parameters go, and in which dtype.
            preparation: What the load has started already.
            recorder: Counts bytes and parameters.
            most_bytes: Of parameters on each GPU at a time.
        """
        preparation.stop_prefetch()
        targets = {name: target for name, target in self.plan.targets.items() if name in names}
        plan = replace(self.plan, targets=targets)
        quantizer = self._quantizer
        return ParameterMaker(
            plan, self._model, self.checkpoint, destinations, quantizer, recorder, preparation, most_bytes
        )

    def are_alike(self, one: str, other: str, equal: Callable[[str, str], bool] | None = None) -> bool:
        """Whether the checkpoint has the same values for two parameters that need no conversion.

        Args:
            one: Its name.
            other: Its name.
            equal: Decides instead of the values, which are not read then.
        """
        sources = [self.plan.made_by[name].source for name in (one, other)]
        if None in sources:
            return False
        first, second = (self.checkpoint[name] for name in sources if name is not None)
        if equal is not None and not is_same(first, second):
            return equal(one, other)
        return are_alike(first, second, (self.dtypes[one], self.dtypes[other]))

    def check_values(self) -> None:
        """Raises NonFiniteWeightError, or warns, if a value that was quantized or cast since the last time is bad."""
        self._quantizer.health.raise_or_warn(strict=self._quantizer.strict, locate=self.locate)

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        """The parameters of one target, once the stream has started; called by transformers' loop.

        Their values may come later. After the last target transformers may look at them, to compare and copy what is
        tied, or let code that is not its own initialize what is missing: then they are waited for here.
        """
        assert self._maker is not None
        made = self._maker.make(name, loading_info)
        self._to_make.discard(name)
        if not self._to_make and looks_at_values(self._model, loading_info.missing_keys - made.keys()):
            self._maker.finish()
        return made

    def stand_ins(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of one target, by name, on meta: shapes and dtypes without values."""
        names = [made for made in self.plan.targets[name].makes() if made in self.dtypes]
        scales = [f"{made}{EXPERT_SCALES}" for made in names if self._quantizer.check_experts_param(made)]
        return {made: self._stand_in(made) for made in [*names, *scales]}

    def _stand_in(self, name: str) -> torch.Tensor:
        shape = self._model.get_parameter_or_buffer(name).shape
        if self._quantizer.check_quantized_param(name):
            return stand_in(shape)
        own = self._quantizer.check_experts_param(name) or name not in self.dtypes
        dtype = self._model.get_parameter_or_buffer(name).dtype if own else self.dtypes[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    def finish(self) -> None:
        """Waits for the values of parameters that were handed out before they had come.

        Raises:
            Pyint8Error: See `TensorStream`.
        """
        if self._maker is not None:
            self._maker.finish()

    def close(self) -> float:
        """Gives back threads, files and memory. Idempotent.

        Returns:
            The seconds since the stream started; 0 if it has not, or was closed before.
        """
        if self._maker is None:
            return 0.0
        self._maker.close()
        self._maker = None
        return time.perf_counter() - self._started_at

    def may_be_router(self, name: str) -> bool:
        """Whether transformers 4 may have quantized a parameter that stays ordinary."""
        return self._quantizer.may_be_router(name)

    def to_revert(self) -> list[WeightTransform]:
        """The conversions that saving the model has to revert."""
        experts = list(filter(self._quantizer.check_experts_param, self.plan.made_by))
        return to_revert(self.plan.used, self._conversions, experts) if experts else self.plan.used

    def conversion_bytes(self) -> int:
        """The bytes of a GPU that the largest conversion (a merge of experts) may need beside its result."""
        sources = (
            sum(self.checkpoint[name].numel for name, _ in target.sources)
            for target in self.plan.targets.values()
            if target.converter is not None and not converts_on_cpu(target.converter)
        )
        # The sources, and as much again for a copy, where they are first stacked, then concatenated.
        return 2 * self._dtype.itemsize * max(sources, default=0)

    def locate(self, name: str) -> dict[str, Any]:
        """The location of a parameter's (or a checkpoint's) tensor, for errors: "tensor", "path" and "offset"."""
        target = self.plan.made_by.get(name)
        source = target.sources[0][0] if target is not None and target.sources else name
        stack = source.partition("[")[0]  # of an element of it
        if source not in self.checkpoint and stack in self.checkpoint:
            return {**self.checkpoint[stack].location, "tensor": source}
        return self.checkpoint[source].location if source in self.checkpoint else {"tensor": name}
