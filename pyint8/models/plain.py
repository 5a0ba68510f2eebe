"""Fills any torch.nn.Module whose state dict has the checkpoint's names, without transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import CheckpointError, OptionError
from pyint8.models import checks
from pyint8.models.assembly import Assembly, Destination, Stored
from pyint8.models.origin import remember_origin
from pyint8.models.reconcile import ABSENT, TIED, check_absent, check_stored, reconcile_modules
from pyint8.models.request import LoadRequest
from pyint8.models.unquantized import report_unquantized
from pyint8.placement.budget import MemoryBudget
from pyint8.placement.device_map import device_of, landing_device
from pyint8.placement.dispatch import dispatch
from pyint8.placement.planner import ModelSizes, plan_device_map
from pyint8.quantizer import Int8Quantizer, find_entry_point, first_overflow, modules_to_keep, tensor_bytes, tied_names
from pyint8.report import Recorder
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.ranks.ranks import Ranks
from pyint8.streaming.reading import open_stream

logger = logging.getLogger(__name__)


def fill_module(module: nn.Module, request: LoadRequest, preparation: Preparation, recorder: Recorder) -> nn.Module:
    """Makes `module`'s linear layers int8 and fills it from the checkpoint.

    Parameters that the checkpoint lacks keep the values they have.

    Raises:
        OptionError: An argument that is for transformers models.
        CheckpointError: A parameter on meta has no tensor in the checkpoint, or a shape is wrong.
    """
    checkpoint = preparation.checkpoint
    assert checkpoint is not None
    _refuse_arguments_for_transformers(request)
    if request.config is not None and request.config.experts:
        raise OptionError("experts=True is for transformers models, whose experts are of known classes")
    _warn_of_own_saving(module)
    pre_quantized = checkpoint.has_codes
    quantizer = Int8Quantizer(request.config or Int8Config(), pre_quantized=pre_quantized, strict=request.strict)
    with _undone_on_failure(module, quantizer):
        with recorder.phase("build"):
            quantizer.validate_environment()
            dtype = quantizer.update_dtype(request.dtype)
            filler = _Filler(module, checkpoint, quantizer, dtype if isinstance(dtype, torch.dtype) else None, recorder)
            filler.replace_modules(quantizer.update_device_map(request.device_map), request.budget)
        with recorder.phase("stream"):
            preparation.stop_prefetch()
            filler.fill(request.options, preparation.ranks)
        with recorder.phase("finish"):
            # accelerate opens these files by their paths.
            checkpoint.require_unchanged({left["safetensors_file"] for left in filler.left_in_files.values()})
            filler.move_remaining()
            quantizer.postprocess_model(module, locate=filler.locate)
            dispatch(module, filler.device_map, request.offload_folder, filler.left_in_files)
    report_unquantized(module, quantizer, recorder.report)
    remember_origin(module, checkpoint.files)
    return module


def _refuse_arguments_for_transformers(request: LoadRequest) -> None:
    if request.arguments:
        named = ", ".join(sorted(request.arguments))
        raise OptionError(f"these arguments mean nothing for a module of your own: {named}")
    if isinstance(request.dtype, Mapping):
        raise OptionError("dtype is a dict, which is for the parts of a transformers model; give one torch.dtype")


def _warn_of_own_saving(module: nn.Module) -> None:
    if hasattr(module, "save_pretrained"):
        logger.warning(
            "%s has a save_pretrained of its own, which does not write that weights are int8: its from_pretrained "
            "would take int8 codes for weights. Save the filled module with pyint8.save(module, folder), and load that "
            "with pyint8.load(folder, model=module)",
            type(module).__name__,
        )


@contextmanager
def _undone_on_failure(module: nn.Module, quantizer: Int8Quantizer) -> Iterator[None]:
    """Puts the module's own layers back if the load fails; parameters that were filled keep their new values."""
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
        recorder: Recorder,
    ) -> None:
        self._module = module
        self._checkpoint = checkpoint
        self._quantizer = quantizer
        self._dtype = dtype
        self._recorder = recorder
        self._assembly = Assembly(quantizer, recorder)
        self.device_map: dict[str, Any] = {}
        self.left_in_files: dict[str, dict[str, str]] = {}  # see `placement.dispatch`
        self._ties = tied_names(module)
        self._loaded: set[str] = set()

    def replace_modules(self, device_map: Any, budget: MemoryBudget) -> None:
        """Replaces layers by int8 ones, refuses what cannot be filled, and decides where everything goes."""
        config = self._quantizer.config
        skip = modules_to_keep(self._module) if config.skip_modules is None else list(config.skip_modules)
        training = self._module.training
        self._quantizer.preprocess_model(self._module, skip=skip, device_map=device_map, training=training)
        self._reconcile_modules()
        self._check_names()
        for name, value in self._module.state_dict().items():
            if name in self._checkpoint:
                check_stored(name, self._stored(name), tuple(value.shape), self._quantizer)
        self.device_map = plan_device_map(
            self._module, device_map, budget, self._sizes(), self._quantizer.adjust_max_memory
        )
        self._quantizer.validate_environment(device_map=self.device_map)

    def _sizes(self) -> ModelSizes:
        dtypes = {
            name: self._target_dtype(self._checkpoint[name].torch_dtype if name in self._checkpoint else tensor.dtype)
            for name, tensor in self._module.named_parameters()
        }
        quantized = {
            name: self._quantizer.adjust_target_dtype(parameter.dtype)
            for name, parameter in self._module.named_parameters()
            if self._quantizer.check_quantized_param(name)
        }
        return ModelSizes(
            dtypes=quantized,
            exact_dtypes={**dtypes, **({} if self._quantizer.config.has_fp16_weight else quantized)},
            nbytes=tensor_bytes(self._module, self._quantizer, dtypes),
            no_split=getattr(self._module, "_no_split_modules", None) or (),
        )

    def _reconcile_modules(self) -> None:
        """Puts linear modules back whose weight is not in the checkpoint, or not int8 there, and those with several
        names, of which only one was replaced."""
        replaced = dict(self._quantizer.converted)
        still_there = {id(module) for module in self._module.modules()}

        def find(weight: str) -> Stored | str:
            if id(replaced[weight.rpartition(".")[0]]) in still_there:
                return "the module has several names"
            if weight in self._checkpoint:
                return self._stored(weight)
            self._refuse_orphans(weight)
            return TIED if weight in self._filled_by_ties else ABSENT

        absent = reconcile_modules(self._module, self._quantizer, find)
        check_absent(self._checkpoint, self._quantizer, replaced, absent, self._module.state_dict())

    def _refuse_orphans(self, weight: str) -> None:
        for leaf in (checks.SCALES, checks.FORMAT):
            if (companion := self._companion(weight, leaf)) is not None:
                checks.refuse_orphan(companion, weight)

    def _stored(self, name: str) -> Stored:
        """What the checkpoint has for a parameter or buffer; codes with what bitsandbytes saves beside them."""
        scales, layout = (self._companion(name, leaf) for leaf in (checks.SCALES, checks.FORMAT))
        return Stored(self._checkpoint[name], scales, layout)

    def _companion(self, name: str, leaf: str) -> Entry | None:
        module, _, own = name.rpartition(".")
        return self._checkpoint.entries.get(f"{module}.{leaf}") if own == "weight" else None

    def _check_names(self) -> None:
        """Refuses parameters and buffers that nothing would fill; reports what is left over."""
        own = self._module.state_dict()
        checks.check_disagreements(self._checkpoint, partial(self._want, own), strict=self._quantizer.strict)
        with_codes = [*self._quantizer.converted, *self._quantizer.read]
        companions = {f"{name}.{leaf}" for name in with_codes for leaf in (checks.SCALES, checks.FORMAT)}
        missing = sorted(set(own) - set(self._checkpoint) - self._filled_by_ties)
        unexpected = sorted(set(self._checkpoint) - set(own) - companions)
        self._recorder.report.loading_info = {"missing_keys": set(missing), "unexpected_keys": set(unexpected)}
        lost = [name for name in missing if own[name].is_meta]
        lost += [name for name, buffer in self._module.named_buffers() if buffer.is_meta and name not in own]
        if own and len(missing) == len(own):
            checks.refuse_unrelated(self._checkpoint, own)
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

    def _want(self, own: Mapping[str, torch.Tensor], name: str) -> checks.Need:
        """Whether the module, whose state dict is `own`, needs a tensor that its checkpoint or an index names."""
        module, _, leaf = name.rpartition(".")
        if leaf == checks.SCALES and self._quantizer.pre_quantized and module in self._quantizer.converted:
            return checks.Need.REQUIRED
        if name not in own or (name not in self._checkpoint and name in self._filled_by_ties):
            return checks.Need.NONE
        return checks.Need.REQUIRED if own[name].is_meta else checks.Need.WANTED

    def fill(self, options: StreamOptions, ranks: Ranks | None = None) -> None:
        """Reads everything that does not stay on the disk, in order of file and offset."""
        own = self._module.state_dict()
        parameters = {name for name, _ in self._module.named_parameters()}
        wanted = {name: (self._stored(name), self._destination(name)) for name in self._checkpoint if name in own}
        for name, (stored, destination) in wanted.items():
            if name in parameters and self._assembly.is_left_on_disk(name, stored, destination):
                self._leave(name, stored, destination)
        wanted = {name: way for name, way in wanted.items() if name not in self.left_in_files}
        requests = [request for name, way in wanted.items() for request in self._assembly.requests(name, *way)]
        self._recorder.expect(sum(request.entry.nbytes for request in requests))
        quantizer = find_entry_point()
        with open_stream(requests, options, recorder=self._recorder, quantizer=quantizer, ranks=ranks) as stream:
            for name, way in wanted.items():
                self._set(name, self._assembly.make(name, *way, stream))
            stream.finish()

    def _leave(self, name: str, stored: Stored, destination: Destination) -> None:
        self._set(name, torch.empty(stored.entry.torch_shape, dtype=destination.dtype, device="meta"))
        self._recorder.count("left on disk")
        self.left_in_files[name] = {
            "safetensors_file": stored.entry.path,
            "weight_name": name,
            "dtype": str(destination.dtype).removeprefix("torch."),
        }

    def move_remaining(self) -> None:
        """Moves what is not in the checkpoint (fresh heads, buffers) to its device, and restores ties."""
        for group in self._ties:
            source = next((name for name in group if name in self._loaded), None)
            if source is not None:
                for name in group:
                    self._set(name, self._module.get_parameter(source))
        rest = [*self._module.named_parameters(), *self._module.named_buffers()]
        for name, tensor in rest:
            if name in self._loaded or tensor.is_meta:
                continue
            # The values of a buffer were computed, in a dtype that the module chose.
            is_buffer = not isinstance(tensor, nn.Parameter)
            dtype = tensor.dtype if is_buffer else self._target_dtype(tensor.dtype)
            moved = tensor.data.to(landing_device(device_of(name, self.device_map)), dtype)
            self._quantizer.health.watch_cast(name, moved, [tensor.dtype], partial(first_overflow, name, tensor.data))
            tensor.data = moved

    def locate(self, name: str) -> dict[str, Any]:
        """Where a tensor lies, for errors: "tensor", "path" and "offset"."""
        entry = self._checkpoint.entries.get(name)
        return {"tensor": name} if entry is None else entry.location

    @cached_property
    def _filled_by_ties(self) -> set[str]:
        return {name for group in self._ties if not group.isdisjoint(self._checkpoint.entries) for name in group}

    def _destination(self, name: str) -> Destination:
        is_tied = any(name in group for group in self._ties)
        device = device_of(name, self.device_map)
        stored = self._stored(name)
        dtype = self._target_dtype(stored.entry.torch_dtype if stored.scales is None else self._stored_dtype)
        return Destination(landing_device(device), dtype, on_disk=device == "disk" and not is_tied)

    def _target_dtype(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    @cached_property
    def _stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint's other tensors, beside int8 weights and their scales."""
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
