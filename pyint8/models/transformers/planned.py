"""A load that has a plan; its stream starts once the device map is known."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint
from pyint8.models.request import LoadRequest
from pyint8.models.transformers.compat import WeightTransform
from pyint8.models.transformers.parameters import ParameterMaker, find_destinations, find_dtypes
from pyint8.models.transformers.plan import plan_load
from pyint8.models.transformers.reconcile import check_index, reconcile
from pyint8.quantizer import Int8Quantizer
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation


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
        self._model, self._checkpoint, self._dtype, self._quantizer = model, checkpoint, dtype, quantizer
        prefix, keys = model.base_model_prefix, model.state_dict()
        self.plan = plan_load(checkpoint, conversions, prefix, keys, pre_quantized=quantizer.pre_quantized)
        allow = request.allows_mismatched_shapes
        check_index(self.plan, model, checkpoint, strict=request.strict, allow_mismatched_shapes=allow)
        parameters = reconcile(self.plan, model, checkpoint, quantizer, allow_mismatched_shapes=allow)
        self.dtypes = find_dtypes(model, parameters, dtype, quantizer)
        self._started_at = 0.0

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
            self._checkpoint,
            find_destinations(self.plan, self.dtypes, device_map),
            self._quantizer,
            recorder,
            preparation,
        )

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        """The parameters of one target, once the stream has started; called by transformers' loop."""
        assert self._maker is not None
        return self._maker.make(name, loading_info)

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

    def conversion_bytes(self) -> int:
        """The bytes of a GPU that the largest conversion (a merge of experts) may need beside its result."""
        sources = (
            sum(self._checkpoint[name].numel for name, _ in target.sources)
            for target in self.plan.targets.values()
            if target.converter is not None and not getattr(target.converter, "force_cpu", False)
        )
        # The sources, and as much again for a copy, where they are first stacked, then concatenated.
        return 2 * self._dtype.itemsize * max(sources, default=0)

    def locate(self, name: str) -> dict[str, Any]:
        """The location of a parameter's (or a checkpoint's) tensor, for errors: "tensor", "path" and "offset"."""
        target = self.plan.made_by.get(name)
        source = target.sources[0][0] if target is not None and target.sources else name
        return self._checkpoint[source].location if source in self._checkpoint else {"tensor": name}
