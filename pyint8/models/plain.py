"""Any torch.nn.Module whose state dict has the checkpoint's names: replaced, filled and placed without transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import CheckpointError
from pyint8.models import checks
from pyint8.models.delivery import cast_in_bands, deliver_cast
from pyint8.models.unquantized import tell_unquantized
from pyint8.placement import dispatch, landing_device, plan_device_map
from pyint8.quantizer import Int8Quantizer, device_of, first_overflow, modules_to_keep, tied_names
from pyint8.report import LoadReport
from pyint8.streaming import Delivery, StreamSource, TensorStream

logger = logging.getLogger("pyint8")


def fill_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device_map: Any,
    dtype: torch.dtype | str | None,
    max_memory: Mapping[Any, Any] | None,
    tightly: bool,
    config: Int8Config,
    offload_folder: Any,
    strict: bool,
    options: StreamOptions,
    report: LoadReport,
    on_bytes: Callable[[int], None],
    on_total: Callable[[int], None],
) -> nn.Module:
    """Makes `module`'s linear layers int8 and fills it from the checkpoint; see `pyint8.load` for the arguments.

    With `tightly`, `max_memory` is what a plan may use (see `pyint8.packing`).

    Parameters that the checkpoint lacks keep the values they have.

    Raises:
        CheckpointError: A parameter on meta has no tensor in the checkpoint, or a shape is wrong.
    """
    quantizer = Int8Quantizer(
        config, pre_quantized=any(name.endswith(f".{checks.SCALES}") for name in checkpoint), strict=strict
    )
    with _undone_on_failure(module, quantizer):
        with report.phase("build"):
            quantizer.validate_environment()
            dtype = quantizer.update_dtype(dtype)
            filler = _Filler(module, checkpoint, quantizer, None if isinstance(dtype, str) else dtype, report)
            filler.replace_modules(quantizer.update_device_map(device_map), max_memory, tightly)
        with report.phase("stream"):
            filler.fill(options, on_bytes, on_total)
        with report.phase("finish"):
            filler.place_the_rest()
            quantizer.postprocess_model(module, locate=filler.locate)
            tell_unquantized(module, quantizer, report)
            dispatch(module, filler.device_map, offload_folder, filler.left_in_files)
    return module


@contextmanager
def _undone_on_failure(module: nn.Module, quantizer: Int8Quantizer) -> Iterator[None]:
    """A load that fails puts the module's own layers back; what was filled until then keeps its new values."""
    try:
        yield
    except BaseException:
        for name, original in quantizer.converted.items():
            module.set_submodule(name, original)
        raise


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
        self.left_in_files: dict[str, dict[str, str]] = {}  # see `placement.dispatch`
        self._ties = tied_names(module)
        self._loaded: set[str] = set()

    def replace_modules(self, device_map: Any, max_memory: Mapping[Any, Any] | None, tightly: bool) -> None:
        """Puts int8 layers in place, refuses what cannot be filled, and decides where everything goes."""
        config = self._quantizer.config
        skip = modules_to_keep(self._module) if config.skip_modules is None else list(config.skip_modules)
        training = self._module.training
        self._quantizer.preprocess_model(self._module, skip=skip, device_map=device_map, training=training)
        self._settle_modules()
        self._check_names()
        for name, value in self._module.state_dict().items():
            if name in self._checkpoint:
                self._check_tensor(name, self._checkpoint[name], tuple(value.shape))
        dtypes = {
            name: self._target_dtype(self._checkpoint[name].torch_dtype if name in self._checkpoint else tensor.dtype)
            for name, tensor in self._module.named_parameters()
        }
        self.device_map = plan_device_map(
            self._module, device_map, max_memory, self._quantizer, dtypes=dtypes, tightly=tightly
        )

    def _settle_modules(self) -> None:
        """Linear modules stay ordinary whose weight is not in the checkpoint, or not int8 there, and those that go by
        several names, of which one was replaced."""
        absent = []
        still_there = {id(module) for module in self._module.modules()}
        for name, original in list(self._quantizer.converted.items()):
            weight = f"{name}.weight"
            entry = self._checkpoint.entries.get(weight)
            if id(original) in still_there:
                self._quantizer.keep_unquantized(self._module, name, "the module has several names")
            elif entry is None:
                self._refuse_orphans(weight)
                tied = weight in self._filled_by_ties()
                reason = "its weight is tied to another" if tied else "its weight is not in the checkpoint"
                self._quantizer.keep_unquantized(self._module, name, reason)
                absent += [] if tied else [name]
            elif self._quantizer.pre_quantized and self._companion(weight, checks.SCALES) is None and entry.is_floating:
                self._quantizer.keep_unquantized(self._module, name, "it is not quantized in the checkpoint")
        self._quantizer.name_absent(absent)

    def _refuse_orphans(self, weight: str) -> None:
        for leaf in (checks.SCALES, checks.FORMAT):
            companion = self._companion(weight, leaf)
            if companion is not None:
                checks.refuse_orphan(companion, weight)

    def _companion(self, weight: str, leaf: str) -> Entry | None:
        """The scales or the format of an int8 weight."""
        return self._checkpoint.entries.get(f"{weight.rpartition('.')[0]}.{leaf}")

    def _check_names(self) -> None:
        """Refuses parameters and buffers that nothing would fill; reports what is left over."""
        own = self._module.state_dict()
        with_codes = [*self._quantizer.converted, *self._quantizer.read]
        companions = {f"{name}.{leaf}" for name in with_codes for leaf in (checks.SCALES, checks.FORMAT)}
        missing = sorted(set(own) - set(self._checkpoint) - self._filled_by_ties())
        unexpected = sorted(set(self._checkpoint) - set(own) - companions)
        self._report.loading_info = {"missing_keys": set(missing), "unexpected_keys": set(unexpected)}
        lost = [name for name in missing if own[name].is_meta]
        lost += [name for name, buffer in self._module.named_buffers() if buffer.is_meta and name not in own]
        if own and len(missing) == len(own):
            raise CheckpointError(
                f"the checkpoint in {self._checkpoint.files[0]} has none of the module's names, such as {missing[0]}, "
                f"but others, such as {next(iter(self._checkpoint), 'none')}; fill what they are of, not a wrapper"
            )
        if lost:
            raise CheckpointError(
                f"the checkpoint in {self._checkpoint.files[0]} has no such tensor, and the module holds no values for "
                "it (it is on meta); are the names the module's own?",
                tensor=lost[0],
            )
        kept = [name for name in missing if name.rpartition(".")[0] not in self._quantizer.skipped]
        if kept:
            logger.warning("not in the checkpoint, so left as they are: %s", ", ".join(kept[:10]))
        if unexpected:
            logger.warning("the checkpoint's %s have no place in the module", ", ".join(unexpected[:10]))

    def _check_tensor(self, name: str, entry: Entry, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that cannot become its parameter or buffer, of `shape` in the module."""
        scales = self._companion(name, checks.SCALES)
        module = name.rpartition(".")[0]
        if not self._takes_codes(name):
            if scales is not None and name.endswith(".weight"):
                checks.refuse_codes(entry, name, self._quantizer.skipped.get(module, "it is no linear module"))
            checks.require_shape(entry, name, shape)
            return
        checks.require_int8_weight(
            self._checkpoint,
            entry,
            name,
            self._quantizer.expected_shape(name, shape),
            scales=None if scales is None else scales.name,
            pre_quantized=self._quantizer.pre_quantized,
        )

    def fill(self, options: StreamOptions, on_bytes: Callable[[int], None], on_total: Callable[[int], None]) -> None:
        own = self._module.state_dict()
        names = [name for name in self._checkpoint if name in own]  # by file and offset: read from front to back
        parameters = {name for name, _ in self._module.named_parameters()}
        for name in names:
            if name in parameters and self._stays_on_disk(name):
                self._leave(name)
        names = [name for name in names if name not in self.left_in_files]
        deliveries = [delivery for name in names for delivery in self._deliveries(name)]
        on_total(sum(delivery.entry.nbytes for delivery in deliveries))

        def count(nbytes: int) -> None:
            self._report.checkpoint_bytes += nbytes
            on_bytes(nbytes)

        with TensorStream(deliveries, options, on_bytes=count) as stream:
            for name in names:
                self._set(name, self._make(name, stream))
            self._report.engine = stream.stats()

    def _stays_on_disk(self, name: str) -> bool:
        """Whether accelerate can read it from the checkpoint itself, whenever a forward pass needs it."""
        is_tied = any(name in group for group in self._ties)
        in_safetensors = self._checkpoint[name].path.endswith(".safetensors")
        on_disk = device_of(name, self.device_map) == "disk"
        return on_disk and in_safetensors and not is_tied and not self._takes_codes(name)

    def _leave(self, name: str) -> None:
        entry = self._checkpoint[name]
        dtype = self._target_dtype(entry.torch_dtype)
        self._set(name, torch.empty(entry.torch_shape, dtype=dtype, device="meta"))
        self._report.tensors["left on disk"] += 1
        self.left_in_files[name] = {
            "safetensors_file": entry.path,
            "weight_name": name,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def place_the_rest(self) -> None:
        """Moves what the checkpoint did not hold (fresh heads, buffers) and ties again what was tied."""
        for group in self._ties:
            source = next((name for name in group if name in self._loaded), None)
            if source is not None:
                for name in group:
                    self._set(name, self._module.get_parameter(source))
        rest = [*self._module.named_parameters(), *self._module.named_buffers()]
        for name, tensor in rest:
            if name in self._loaded or tensor.is_meta:
                continue
            is_buffer = not isinstance(tensor, nn.Parameter)  # its values were computed, in a dtype of their choice
            dtype = tensor.dtype if is_buffer else self._target_dtype(tensor.dtype)
            moved = tensor.data.to(self._device(name), dtype)
            self._quantizer.health.watch_cast(name, moved, [tensor.dtype], partial(first_overflow, name, tensor.data))
            tensor.data = moved

    def locate(self, name: str) -> dict[str, Any]:
        """Where a tensor lies, for errors: "tensor", "path" and "offset"."""
        entry = self._checkpoint.entries.get(name)
        return {"tensor": name} if entry is None else entry.place

    def _filled_by_ties(self) -> set[str]:
        return {name for group in self._ties if not group.isdisjoint(self._checkpoint.entries) for name in group}

    def _device(self, name: str) -> torch.device:
        return landing_device(device_of(name, self.device_map))

    def _target_dtype(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def _takes_codes(self, name: str) -> bool:
        """Whether it becomes an int8 weight, or is made of one that the checkpoint has."""
        has_scales = self._companion(name, checks.SCALES) is not None
        return self._quantizer.check_quantized_param(name) or (has_scales and self._quantizer.dequantizes(name))

    def _deliveries(self, name: str) -> list[Delivery]:
        entry, device = self._checkpoint[name], self._device(name)
        if not self._takes_codes(name):
            return [Delivery(entry, device, in_bands=cast_in_bands(entry, self._target_dtype(entry.torch_dtype)))]
        deliveries = [Delivery(entry, device, in_bands=self._quantizer.reads_bands)]
        if (scales := self._companion(name, checks.SCALES)) is not None:
            deliveries.insert(0, Delivery(scales, device))
        if (layout := self._companion(name, checks.FORMAT)) is not None:
            deliveries.insert(0, Delivery(layout, torch.device("cpu")))
        return deliveries

    def _make(self, name: str, stream: TensorStream) -> torch.Tensor:
        entry, device = self._checkpoint[name], self._device(name)
        dtype = self._target_dtype(entry.torch_dtype)
        if not self._takes_codes(name):
            self._report.tensors["as stored" if dtype == entry.torch_dtype else "cast"] += 1
            return deliver_cast(stream, entry, name, dtype, device, self._quantizer.health)
        self._report.tensors[self._quantizer.kind_of(name)] += 1
        if (layout := self._companion(name, checks.FORMAT)) is not None:
            checks.require_row_major(int(stream.whole(layout.name)), entry)
        scales = self._companion(name, checks.SCALES)
        return self._quantizer.create_quantized_param(
            name,
            StreamSource(stream, entry),
            scales=None if scales is None else stream.whole(scales.name),
            model_dtype=dtype if entry.is_floating else self._target_dtype(self._stored_dtype()),
            device=device,
        )

    def _stored_dtype(self) -> torch.dtype:
        """That of what the checkpoint has beside int8 weights and their scales."""
        rest = (entry for entry in self._checkpoint.entries.values() if not entry.name.endswith(f".{checks.SCALES}"))
        return next((entry.torch_dtype for entry in rest if entry.is_floating), torch.float16)

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
