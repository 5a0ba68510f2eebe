"""Any torch.nn.Module whose state dict has the checkpoint's names: replaced, filled and placed without transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import CheckpointError, OptionError, QuantizationStateError, ShapeMismatchError
from pyint8.models.delivery import cast_in_bands, deliver_cast
from pyint8.placement import device_of, dispatch, landing_device, plan_device_map
from pyint8.quantizer import Int8Quantizer, modules_to_keep
from pyint8.report import LoadReport
from pyint8.streaming import Delivery, StreamSource, TensorStream

logger = logging.getLogger("pyint8")

_SCALES = ".SCB"
_FORMAT = ".weight_format"


def fill_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device_map: Any,
    dtype: torch.dtype | str | None,
    max_memory: Mapping[Any, Any] | None,
    config: Int8Config,
    offload_folder: Any,
    strict: bool,
    options: StreamOptions,
    report: LoadReport,
    on_bytes: Callable[[int], None],
    on_total: Callable[[int], None],
) -> nn.Module:
    """Makes `module`'s linear layers int8 and fills it from the checkpoint; see `pyint8.load` for the arguments.

    Parameters that the checkpoint lacks keep the values they have.

    Raises:
        CheckpointError: A parameter on meta has no tensor in the checkpoint, or a shape is wrong.
    """
    quantizer = Int8Quantizer(config, pre_quantized=any(name.endswith(_SCALES) for name in checkpoint), strict=strict)
    with report.phase("build"):
        quantizer.validate_environment()
        skip = modules_to_keep(module) if config.skip_modules is None else list(config.skip_modules)
        asked = quantizer.update_device_map(device_map)
        quantizer.preprocess_model(module, skip=skip, device_map=asked)
        filler = _Filler(module, checkpoint, quantizer, _dtype(quantizer.update_dtype(dtype)), report)
        filler.settle_modules()
        filler.check()
        filler.device_map = plan_device_map(module, asked, max_memory, quantizer)
    with report.phase("stream"):
        filler.fill(options, on_bytes, on_total)
    with report.phase("finish"):
        filler.place_the_rest()
        quantizer.postprocess_model(module)
        dispatch(module, filler.device_map, offload_folder)
    report.skipped = dict(quantizer.skipped)
    return module


def _dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """A torch.dtype by name; None for "auto"."""
    if dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise OptionError(f'dtype is {dtype!r}; it must be a torch.dtype, the name of one, "auto" or None')
    return found


class _Filler:
    """The steps of one load into one module."""

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        quantizer: Int8Quantizer,
        dtype: torch.dtype | None,
        report: LoadReport,
    ) -> None:
        self._module = module
        self._checkpoint = checkpoint
        self._quantizer = quantizer
        self._dtype = dtype
        self._report = report
        self.device_map: dict[str, Any] = {}
        self._ties = _tied_names(module)
        self._loaded: set[str] = set()

    def settle_modules(self) -> None:
        """Linear modules without a weight in the checkpoint, or with one that is not int8 there, stay ordinary."""
        absent = []
        for name in list(self._quantizer.converted):
            weight = self._checkpoint.entries.get(f"{name}.weight")
            if weight is None:
                self._quantizer.keep_unquantized(self._module, name, "its weight is not in the checkpoint")
                absent.append(name)
            elif self._quantizer.pre_quantized and name + _SCALES not in self._checkpoint and weight.is_floating:
                self._quantizer.keep_unquantized(self._module, name, "it is not quantized in the checkpoint")
        self._quantizer.name_absent(absent)

    def check(self) -> None:
        """Refuses wrong shapes and parameters that nothing would fill; reports what is left over."""
        own = self._module.state_dict()
        companions = {name + suffix for name in self._quantizer.converted for suffix in (_SCALES, _FORMAT)}
        missing = sorted(set(own) - set(self._checkpoint) - self._filled_by_ties())
        unexpected = sorted(set(self._checkpoint) - set(own) - companions)
        self._report.loading_info = {"missing_keys": set(missing), "unexpected_keys": set(unexpected)}
        for name in missing:
            if own[name].is_meta:
                raise CheckpointError(
                    f"the checkpoint in {self._checkpoint.files[0]} has no such tensor, and the module holds no "
                    "values for it (it is on meta); are the names the module's own?",
                    tensor=name,
                )
        if unexpected:
            logger.warning("the checkpoint's %s have no place in the module", ", ".join(unexpected[:10]))
        for name in set(own) & set(self._checkpoint):
            entry = self._checkpoint[name]
            quantized = self._quantizer.check_quantized_param(name)
            expected = self._quantizer.expected_shape(self._module, name) if quantized else tuple(own[name].shape)
            if entry.torch_shape != expected:
                raise ShapeMismatchError(
                    f"its shape is {list(entry.shape)}, and the module needs {list(expected)}",
                    **entry.place,
                )

    def fill(self, options: StreamOptions, on_bytes: Callable[[int], None], on_total: Callable[[int], None]) -> None:
        own = self._module.state_dict()
        names = [name for name in self._checkpoint if name in own]  # by file and offset: read from front to back
        deliveries = [delivery for name in names for delivery in self._deliveries(name)]
        on_total(sum(delivery.entry.nbytes for delivery in deliveries))

        def count(nbytes: int) -> None:
            self._report.checkpoint_bytes += nbytes
            on_bytes(nbytes)

        with TensorStream(deliveries, options, on_bytes=count) as stream:
            for name in names:
                self._set(name, self._make(name, stream))
            self._report.engine = stream.stats()

    def place_the_rest(self) -> None:
        """Moves what the checkpoint did not hold (fresh heads, buffers) and ties again what was tied."""
        for group in self._ties:
            source = next((name for name in group if name in self._loaded), None)
            if source is not None:
                for name in group:
                    self._set(name, self._module.get_parameter(source))
        rest = [*self._module.named_parameters(), *self._module.named_buffers()]
        for name, tensor in rest:
            if name not in self._loaded and not tensor.is_meta:
                tensor.data = tensor.data.to(self._device(name), self._target_dtype(tensor.dtype))

    def _filled_by_ties(self) -> set[str]:
        return {name for group in self._ties if not group.isdisjoint(self._checkpoint.entries) for name in group}

    def _device(self, name: str) -> torch.device:
        return landing_device(device_of(name, self.device_map))

    def _target_dtype(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def _deliveries(self, name: str) -> list[Delivery]:
        entry, device = self._checkpoint[name], self._device(name)
        if not self._quantizer.check_quantized_param(name):
            return [Delivery(entry, device, in_bands=cast_in_bands(entry, self._target_dtype(entry.torch_dtype)))]
        scales = self._scales_of(name)
        extra = [] if scales is None else [Delivery(scales, device)]
        return [*extra, Delivery(entry, device, in_bands=self._quantizer.reads_bands)]

    def _scales_of(self, name: str) -> Entry | None:
        return self._checkpoint.entries.get(name.removesuffix(".weight") + _SCALES)

    def _make(self, name: str, stream: TensorStream) -> torch.Tensor:
        entry, device = self._checkpoint[name], self._device(name)
        dtype = self._target_dtype(entry.torch_dtype)
        if not self._quantizer.check_quantized_param(name):
            self._report.tensors["as stored" if dtype == entry.torch_dtype else "cast"] += 1
            return deliver_cast(stream, entry, name, dtype, device, self._quantizer.health)
        self._report.tensors["pre-quantized" if self._quantizer.pre_quantized else "int8"] += 1
        scales = self._scales_of(name)
        try:
            return self._quantizer.create_quantized_param(
                name,
                StreamSource(stream, entry),
                scales=None if scales is None else stream.whole(scales.name),
                model_dtype=dtype,
                device=device,
            )
        except QuantizationStateError as error:
            raise QuantizationStateError(error.problem, **entry.place) from None

    def _set(self, name: str, value: torch.Tensor) -> None:
        owner_name, _, leaf = name.rpartition(".")
        owner = self._module.get_submodule(owner_name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            old = owner._parameters[leaf]
            if not isinstance(value, nn.Parameter):
                wants_gradient = value.is_floating_point() and (old is None or old.requires_grad)
                value = nn.Parameter(value, requires_grad=wants_gradient)
            owner._parameters[leaf] = value
        self._loaded.add(name)


def _tied_names(module: nn.Module) -> list[set[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]
