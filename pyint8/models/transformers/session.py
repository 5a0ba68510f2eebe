"""One load of a transformers model: the plan, the stream, and making each parameter when transformers asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.accelerate import expand_device_map

from pyint8.checkpoint import Checkpoint, Entry, checkpoint_of_files
from pyint8.config import StreamOptions
from pyint8.errors import QuantizationStateError, ShapeMismatchError
from pyint8.models.delivery import cast_in_bands, deliver_cast
from pyint8.models.transformers.plan import LoadPlan, Target, entry_of, make_plan
from pyint8.quantizer import Int8Quantizer, TensorSource
from pyint8.report import LoadReport
from pyint8.streaming import Delivery, StreamSource, TensorStream

_active: ContextVar[LoadSession | None] = ContextVar("pyint8_load_session", default=None)


@dataclass
class _Place:
    """Where a parameter goes and as what."""

    device: torch.device
    dtype: torch.dtype
    on_disk: bool


class LoadSession:
    """What one load knows, from the checkpoint's headers to the last parameter.

    Args:
        options: How to move bytes.
        strict: See `pyint8.load`.
        checkpoint: If it was opened already.
        report: Filled on the way.
        on_bytes: Called with numbers of bytes as they land.
        on_total: Called once with the number of bytes that will be read.
        allow_mismatched_shapes: Leave tensors of a wrong shape to transformers, which reports or reinitializes them.
    """

    def __init__(
        self,
        options: StreamOptions,
        *,
        strict: bool = True,
        checkpoint: Checkpoint | None = None,
        report: LoadReport | None = None,
        on_bytes: Any = None,
        on_total: Any = None,
        allow_mismatched_shapes: bool = True,
    ) -> None:
        self.options = options
        self.strict = strict
        self.checkpoint = checkpoint
        self.report = LoadReport() if report is None else report
        self.quantizer: Int8Quantizer
        self.device_map: Mapping[str, Any] | None = None
        self.plan: LoadPlan
        self._on_bytes = on_bytes
        self._on_total = on_total
        self._allow_mismatched_shapes = allow_mismatched_shapes
        self._stream: TensorStream | None = None
        self._places: dict[str, _Place] = {}

    @staticmethod
    def active() -> LoadSession | None:
        """The session of the `pyint8.load` that is under way on this thread."""
        return _active.get()

    @contextmanager
    def activate(self) -> Iterator[None]:
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self.close()

    def close(self) -> None:
        """Gives back threads, files and memory; the report keeps what the engine did."""
        if self._stream is not None:
            self.report.engine = self._stream.stats()
            self._stream.close()
            self._stream = None

    # --- Planning ---------------------------------------------------------------------------------------------------

    def open_files(self, files: Sequence[str]) -> None:
        """The files that transformers resolved; read again only if they are others than those opened before."""
        if self.checkpoint is None or set(self.checkpoint.files) != set(files):
            with self.report.phase("read headers"):
                self.checkpoint = checkpoint_of_files(files)

    def make_plan(self, model: Any, conversions: list[Any], dtype: torch.dtype) -> LoadPlan:
        """Decides every tensor's place, and which of the replaced modules must be put back.

        Raises:
            ShapeMismatchError: A tensor's shape is not its parameter's.
            QuantizationStateError: int8 codes for a module that is not quantized here.
        """
        assert self.checkpoint is not None
        self._model, self._dtype = model, dtype
        self.plan = make_plan(
            self.checkpoint,
            conversions,
            model.base_model_prefix,
            model.state_dict(),
            pre_quantized=self.quantizer.pre_quantized,
        )
        self._settle_modules()
        self._check_shapes()
        return self.plan

    def _settle_modules(self) -> None:
        """A module whose weight is absent, or not int8 in a pre-quantized checkpoint, stays as it was."""
        made_by = self.plan.made_by()
        absent = []
        for name in list(self.quantizer.converted):
            target = made_by.get(f"{name}.weight")
            if target is None:
                self.quantizer.keep_unquantized(self._model, name, "its weight is not in the checkpoint")
                absent.append(name)
            elif (reason := self._why_ordinary(target, f"{name}.weight")) is not None:
                self.quantizer.keep_unquantized(self._model, name, reason)
        self.quantizer.name_absent(absent)

    def _why_ordinary(self, target: Target, name: str) -> str | None:
        assert self.checkpoint is not None
        entry = entry_of(target, self.checkpoint)
        if entry is None:
            return None
        if self.quantizer.pre_quantized and target.scales is None and entry.is_floating:
            return "it is not quantized in the checkpoint"
        if self._allow_mismatched_shapes and entry.shape != self.quantizer.expected_shape(self._model, name):
            return "its weight in the checkpoint has another shape"
        return None

    def _check_shapes(self) -> None:
        assert self.checkpoint is not None
        parameters = self._model.state_dict()
        for name, target in self.plan.targets.items():
            entry = entry_of(target, self.checkpoint)
            if entry is None:
                continue
            quantized = self.quantizer.check_quantized_param(name)
            if target.scales is not None and not quantized:
                raise QuantizationStateError(
                    f"int8 codes for {name}, whose module is not quantized here: "
                    f"{self.quantizer.skipped.get(name.rpartition('.')[0], 'it is no linear module')}",
                    tensor=entry.name,
                    path=entry.path,
                    offset=entry.offset,
                )
            expected = self.quantizer.expected_shape(self._model, name) if quantized else tuple(parameters[name].shape)
            if entry.shape != expected and not self._allow_mismatched_shapes:
                raise ShapeMismatchError(
                    f"its shape is {list(entry.shape)}, and {name} needs {list(expected)}; is this the checkpoint of "
                    "this configuration? (ignore_mismatched_sizes=True initializes such parameters afresh)",
                    tensor=entry.name,
                    path=entry.path,
                    offset=entry.offset,
                )

    # --- Streaming --------------------------------------------------------------------------------------------------

    def _start(self) -> TensorStream:
        assert self.checkpoint is not None
        self._places = self._find_places()
        self._buffers = {name for name, _ in self._model.named_buffers()}
        deliveries = [delivery for target in self.plan.targets.values() for delivery in self._deliveries(target)]
        if self._on_total is not None:
            self._on_total(sum(delivery.entry.nbytes for delivery in deliveries))
        self._stream = TensorStream(deliveries, self.options, on_bytes=self._count_bytes)
        return self._stream

    def _count_bytes(self, nbytes: int) -> None:
        self.report.checkpoint_bytes += nbytes
        if self._on_bytes is not None:
            self._on_bytes(nbytes)

    def _find_places(self) -> dict[str, _Place]:
        """Devices by transformers' own expansion of the map; dtypes by the rule of its loading loop."""
        parameters = self._model.state_dict()
        names = [name for target in self.plan.targets.values() for name in target.makes() if name in parameters]
        devices = expand_device_map(self.device_map, names)
        fixed = self._model._get_dtype_plan(self._dtype)
        pattern, group_names, _ = build_glob_alternation(list(fixed)) if fixed else (None, {}, None)

        def dtype_of(name: str) -> torch.dtype:
            match = pattern.search(name) if pattern is not None else None
            if match is not None:
                return fixed[group_names[match.lastgroup]]  # type: ignore[no-any-return]
            if self.quantizer.check_quantized_param(name):
                return self._dtype
            return parameters[name].dtype  # type: ignore[no-any-return]

        return {
            name: _Place(torch.device("cpu" if device == "disk" else device), dtype_of(name), device == "disk")
            for name, device in devices.items()
        }

    def _stays_on_disk(self, target: Target) -> bool:
        """Whether accelerate will read it from the checkpoint itself, whenever a forward pass needs it."""
        return target.converter is None and self._places[target.name].on_disk and target.name not in self._buffers

    def _deliveries(self, target: Target) -> list[Delivery]:
        assert self.checkpoint is not None
        if self._stays_on_disk(target):
            return []
        place = self._places[target.name]
        device = self._landing_device(target)
        deliveries = []
        for name in target.collected():
            entry = self.checkpoint[name]
            if name == target.format:  # one byte to look at
                deliveries.append(Delivery(entry, torch.device("cpu")))
            elif name == target.scales or target.converter is not None:
                deliveries.append(Delivery(entry, device))
            elif self.quantizer.check_quantized_param(target.name):
                deliveries.append(Delivery(entry, device, in_bands=self.quantizer.reads_bands))
            else:
                deliveries.append(Delivery(entry, device, in_bands=cast_in_bands(entry, place.dtype)))
        return deliveries

    def _landing_device(self, target: Target) -> torch.device:
        """Some conversions need too much memory for a GPU; transformers does them on the CPU."""
        on_cpu = getattr(target.converter, "force_cpu", False)
        return torch.device("cpu") if on_cpu else self._places[target.name].device

    def realize(self, name: str, loading_info: Any) -> dict[str, Any]:
        """Makes the parameters of one target; called by transformers' loop, in the order of the plan."""
        with self.report.phase("stream"):
            try:
                stream = self._stream or self._start()
                if loading_info is not None:
                    loading_info.unexpected_keys.update(self.plan.also_unexpected)
                return self._realize(self.plan.targets[name], stream, loading_info)
            except BaseException:
                self.close()
                raise

    def _realize(self, target: Target, stream: TensorStream, loading_info: Any) -> dict[str, Any]:
        if self._stays_on_disk(target):
            loading_info.missing_keys.discard(target.name)
            self.report.tensors["left on disk"] += 1
            return {}
        if target.converter is not None:
            return self._converted(target, stream, loading_info)
        assert self.checkpoint is not None
        place = self._places[target.name]
        if self.quantizer.check_quantized_param(target.name):
            return {target.name: self._quantized(target, stream, place)}
        assert target.source is not None
        entry = self.checkpoint[target.source]
        self.report.tensors["as stored" if entry.torch_dtype == place.dtype else "cast"] += 1
        return {target.name: deliver_cast(stream, entry, target.name, place.dtype, place.device, self.quantizer.health)}

    def _quantized(self, target: Target, stream: TensorStream, place: _Place) -> torch.Tensor:
        assert self.checkpoint is not None
        if target.source is None:
            assert target.scales is not None or target.format is not None
            orphan = self.checkpoint[target.scales or str(target.format)]
            raise QuantizationStateError(
                f"it belongs to {target.name}, which the checkpoint does not have; save the quantized model again",
                tensor=orphan.name,
                path=orphan.path,
                offset=orphan.offset,
            )
        entry = self.checkpoint[target.source]
        try:
            return self.quantizer.create_quantized_param(
                target.name,
                StreamSource(stream, entry),
                scales=self._scales(target, stream, entry),
                model_dtype=place.dtype,
                device=place.device,
            )
        except QuantizationStateError as error:
            raise type(error)(error.problem, tensor=entry.name, path=entry.path, offset=entry.offset) from None
        finally:
            self.report.tensors["pre-quantized" if self.quantizer.pre_quantized else "int8"] += 1

    def _scales(self, target: Target, stream: TensorStream, weight: Entry) -> torch.Tensor | None:
        assert self.checkpoint is not None
        if target.format is not None:
            layout = stream.whole(target.format)
            if layout.numel() != 1 or int(layout) != 0:
                raise QuantizationStateError("only int8 weights of format 0 (row-major) can be loaded")
        if target.scales is None:
            return None
        scales = self.checkpoint[target.scales]
        if scales.shape != weight.shape[:1] or scales.dtype != "F32":
            raise QuantizationStateError(
                f"its scales {target.scales} are {scales.dtype} {list(scales.shape)}; they must be F32 "
                f"{list(weight.shape[:1])}"
            )
        return stream.whole(target.scales)

    def _converted(self, target: Target, stream: TensorStream, loading_info: Any) -> dict[str, Any]:
        """What the model's own converter (an expert merge, a split) makes, then quantized where that is wanted."""
        assert self.checkpoint is not None
        converter = deepcopy(target.converter)
        assert converter is not None
        device, dtype = self._landing_device(target), self._places[target.name].dtype
        for name, pattern in target.sources:
            entry = self.checkpoint[name]
            if entry.dtype == "I8" and self.quantizer.pre_quantized:
                raise QuantizationStateError(
                    f"int8 codes cannot be split or fused into {target.name}; quantize the 16-bit checkpoint instead",
                    tensor=name,
                    path=entry.path,
                    offset=entry.offset,
                )
            converter.add_tensor(target.name, name, pattern, partial(_read_for_conversion, stream, name, device, dtype))
        made = converter.convert(
            target.name, model=self._model, config=self._model.config, hf_quantizer=None, loading_info=loading_info
        )
        return {name: self._finished(name, value) for name, value in made.items()}

    def _finished(self, name: str, value: Any) -> torch.Tensor:
        """One result of a conversion, quantized where that is wanted, on its device."""
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        self.report.tensors["converted"] += 1
        place = self._places[name]
        if not self.quantizer.check_quantized_param(name):
            return tensor.to(place.device)
        return self.quantizer.create_quantized_param(
            name, TensorSource(tensor), model_dtype=place.dtype, device=place.device
        )


def _read_for_conversion(stream: TensorStream, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return stream.whole(name).to(device=device, dtype=dtype)
