"""The int8 lifecycle, by the verbs of transformers' 8-bit quantizer from which it descends.

It knows torch, accelerate's device maps and bitsandbytes, but neither transformers' loading nor where bytes come
from: `pyint8.models` calls the verbs in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from pyint8.config import Int8Config
from pyint8.placement.device_map import DeviceMap, off_device
from pyint8.quantizer import requirements, weights
from pyint8.quantizer.backend import current_device, require_device
from pyint8.quantizer.experts.modules import Int8Experts, convert_experts
from pyint8.quantizer.experts.names import WEIGHTS
from pyint8.quantizer.health import WeightHealth
from pyint8.quantizer.modules import choose_modules, is_conv1d, original_class, replace_with_int8, why_read
from pyint8.quantizer.skip_list import Matches, check_entries, entry_for, name_matches, warn_of_dead_entries
from pyint8.quantizer.weights import WeightSource

logger = logging.getLogger(__name__)

_Dtype = TypeVar("_Dtype")


class Int8Quantizer:
    """One load's quantizer.

    Args:
        config: What to quantize.
        pre_quantized: The checkpoint holds int8 weights already.
        strict: Raise for weights that cannot be quantized soundly; otherwise warn once and do what bitsandbytes does.

    Attributes:
        converted: Modules that were replaced by `Linear8bitLt`, by name, as they were before.
        experts: Modules of experts whose weights are int8, by name.
        skipped: Linear modules, and asked-for experts, that were not converted, by name, with the reason.
        read: Of these, the modules whose weight the model reads without calling them, by name.
        acknowledged: Of `skipped`, the names that were left out on request, or that a warning has named.
        skip: The modules not to convert: those given, and those found while the model was prepared.
        found: Of these, the latter.
        health: Collects bad values of weights.
    """

    def __init__(self, config: Int8Config, *, pre_quantized: bool = False, strict: bool = True) -> None:
        requirements.refuse_contradictions(config, pre_quantized=pre_quantized)
        self.config = config
        self.pre_quantized = pre_quantized
        self.strict = strict
        self.converted: dict[str, nn.Module] = {}
        self.experts: dict[str, Int8Experts] = {}
        self.skipped: dict[str, str] = {}
        self.read: dict[str, nn.Module] = {}
        self.acknowledged: set[str] = set()
        self.skip: list[str] = []
        self.found: list[str] = []
        self.health = WeightHealth()
        self._preprocessed = False

    # --- Before the model is there --------------------------------------------------------------------------------

    def validate_environment(self, *, device_map: Any = None, **arguments: Any) -> None:
        """Refuses what cannot work.

        Raises:
            MissingDependencyError, DependencyVersionError: accelerate or bitsandbytes is absent or too old.
            OptionError: `from_tf` or `from_flax`.
            EnvironmentNotSupportedError: bitsandbytes has no backend for this machine.
            PlacementError: The device map puts modules that are to be quantized on the CPU or the disk beside a GPU
                (checked here once the modules are known; `preprocess_model` checks a map that was given earlier).
        """
        requirements.require_packages()
        requirements.refuse_other_frameworks(arguments)
        require_device()
        if self._preprocessed and isinstance(device_map, Mapping):
            self._check_placement(device_map)

    def adjust_max_memory(self, max_memory: Mapping[Any, Any]) -> dict[Any, float]:
        """Keeps a tenth of every device free for the buffers of quantization."""
        return {device: memory * 0.90 for device, memory in max_memory.items()}

    def update_dtype(self, dtype: _Dtype | None) -> _Dtype | torch.dtype:
        """None means float16, what bitsandbytes computes in; everything else ("auto" too) is kept."""
        if dtype is not None:
            return dtype
        logger.info(
            "dtype=None: modules that are not quantized are loaded in float16, what bitsandbytes computes in; pass "
            'dtype="auto" for the checkpoint\'s own, or a torch.dtype'
        )
        return torch.float16

    def update_device_map(self, device_map: Any) -> Any:
        """None means the current CUDA (NPU, HPU, XPU) device, or the CPU where there is none."""
        if device_map is not None:
            return device_map
        device = current_device()
        logger.info("device_map was not given: the model goes to %s; pass device_map='auto' to place it", device)
        return {"": device}

    def adjust_target_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a quantized weight when memory is planned: int8, whatever `dtype` it is stored in."""
        if dtype != torch.int8:
            logger.debug("memory is planned with int8 weights instead of %s", dtype)
        return torch.int8

    # --- Before loading -------------------------------------------------------------------------------------------

    def preprocess_model(
        self,
        model: nn.Module,
        *,
        skip: list[str],
        device_map: Any,
        matches: Matches = name_matches,
        warn_of_dead: bool = True,
        facts: Mapping[str, Any] | None = None,
        training: bool = False,
    ) -> None:
        """Replaces linear modules by `Linear8bitLt` on meta.

        Args:
            model: Changed in place.
            skip: Modules not to convert: those given or found, and those kept in fp32.
            device_map: Where modules go, if known yet; under `fp32_cpu_offload` what it puts on the CPU or the
                disk is not converted.
            matches: Whether a module's name is in such a list.
            warn_of_dead: Warn of entries of the configuration's `skip_modules` that match nothing: only if they were
                written for this load, and did not come with the checkpoint.
            facts: Attributes that modules or configurations will have once the model is loaded.
            training: Whether code that runs in training mode only counts too.

        Raises:
            OptionError: An entry of `skip_modules` that is no regular expression.
            PlacementError: See `validate_environment`.
        """
        asked = list(self.config.skip_modules or ())
        check_entries(asked)
        if warn_of_dead:
            warn_of_dead_entries(model, asked, matches)
        offloaded = off_device(device_map) if self.config.fp32_cpu_offload else []
        self.skip = [*skip, *offloaded]
        self.converted, self.skipped = choose_modules(model, lambda name: not matches(name, self.skip))
        self.acknowledged = {name for name in self.skipped if matches(name, [*asked, *offloaded])}
        if not self.config.has_fp16_weight:
            self._leave_out_read(model, facts or {}, training=training)
        replace_with_int8(model, self.converted, self.config, pre_quantized=self.pre_quantized)
        if self.config.experts:
            self.experts, left_out = convert_experts(model, lambda name: not matches(name, self.skip))
            self.skipped |= left_out
        if not self.converted and not self.experts:
            logger.warning(
                "nothing in this %s is quantized: it has no linear modules but those skipped", type(model).__name__
            )
        self._preprocessed = True
        if isinstance(device_map, Mapping):
            self._check_placement(device_map)

    def _leave_out_read(self, model: nn.Module, facts: Mapping[str, Any], *, training: bool) -> None:
        """Keeps modules ordinary whose weight the model reads itself: it would take codes for weights."""
        reasons = why_read(model, self.converted, {"is_loaded_in_8bit": True, **facts}, training=training)
        self.read = {name: self.converted.pop(name) for name in reasons}
        self.skipped |= reasons
        self._say_unquantized(reasons)

    def adopt(self, modules: Mapping[str, nn.Module]) -> None:
        """Takes `Linear8bitLt` of a model that is loaded already, by name, as modules that were converted."""
        self.converted = dict(modules)

    def put_back(self, model: nn.Module, name: str, reason: str) -> None:
        """Puts an ordinary module back that `preprocess_model` replaced, because its weight is absent or unsuitable."""
        model.set_submodule(name, self.converted.pop(name))
        self.skipped[name] = reason
        self._say_unquantized([name])

    def _say_unquantized(self, names: Iterable[str]) -> None:
        """A saved model must list modules that are not int8, or their floats would be read as codes."""
        found = [entry_for(name, self.converted) for name in names]
        self.found += found
        self.skip += found

    def expected_shape(self, parameter_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the checkpoint must hold a quantized weight that has `shape` in the model."""
        if self.check_experts_param(parameter_name):
            swapped = (*shape[:-2], shape[-1], shape[-2])
            return swapped if self.is_stored_transposed(parameter_name) else tuple(shape)
        module = self.read.get(parameter_name.rpartition(".")[0])
        transposed = self.is_stored_transposed(parameter_name) if module is None else is_conv1d(type(module))
        return tuple(reversed(shape)) if transposed else tuple(shape)

    @property
    def reads_bands(self) -> bool:
        """Whether quantized weights are read band by band, or whole."""
        return not (self.pre_quantized or self.config.has_fp16_weight)

    # --- While loading --------------------------------------------------------------------------------------------

    def check_quantized_param(self, parameter_name: str) -> bool:
        """Whether this name is the weight of a module that was converted."""
        module_name, _, leaf = parameter_name.rpartition(".")
        return leaf == "weight" and module_name in self.converted

    def check_experts_param(self, parameter_name: str) -> bool:
        """Whether this name is a weight of experts that are int8."""
        module_name, _, leaf = parameter_name.rpartition(".")
        return leaf in WEIGHTS and module_name in self.experts

    def quantizes_experts(self, parameter_name: str) -> bool:
        """The same, of weights that are not int8 in the checkpoint."""
        return not self.pre_quantized and self.check_experts_param(parameter_name)

    def takes_codes(self, parameter_name: str, has_scales: bool) -> bool:
        """Whether a parameter becomes an int8 weight, or is dequantized from codes whose scales the checkpoint has."""
        return self.check_quantized_param(parameter_name) or (has_scales and self.dequantizes(parameter_name))

    def dequantizes(self, parameter_name: str) -> bool:
        """Whether codes of an int8 checkpoint become an ordinary weight: of a module that is read, or a router, which
        transformers 4 quantized too."""
        is_read = parameter_name.removesuffix(".weight") in self.read
        return self.pre_quantized and (is_read or self.may_be_router(parameter_name))

    def may_be_router(self, parameter_name: str) -> bool:
        """Whether it is the weight of a mixture's module that is no linear one in transformers 5, and was in 4."""
        module_name, _, leaf = parameter_name.rpartition(".")
        is_other = module_name not in self.converted and module_name not in self.skipped
        return bool(self.experts) and leaf == "weight" and is_other

    def kind_of(self, parameter_name: str) -> str:
        """The report's kind of a weight that `create_quantized_param` makes."""
        if self.dequantizes(parameter_name):
            return "dequantized"
        return "pre-quantized" if self.pre_quantized else "int8"

    def create_quantized_param(
        self,
        parameter_name: str,
        source: WeightSource,
        *,
        scales: torch.Tensor | None = None,
        model_dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """The weight of a converted module, or a dequantized weight, on `device`.

        Args:
            parameter_name: Its name in the model.
            source: Its value; [out, in], or [in, out] for a Conv1D's weight that is not pre-quantized.
            scales: The `SCB` of a pre-quantized weight, fp32 [out].
            model_dtype: The dtype the weight would have unquantized.
            device: Where it is quantized and stays.

        Returns:
            An `Int8Params`; with `has_fp16_weight` what bitsandbytes has on this device; dequantized, `model_dtype`.

        Raises:
            QuantizationStateError: A pre-quantized weight without scales, or not int8.
        """
        if self.pre_quantized:
            codes = source.whole() if self.dequantizes(parameter_name) else source.later()
            scales = weights.checked_scales(parameter_name, codes, scales)
            self.health.watch_scales(parameter_name, scales)
            if self.dequantizes(parameter_name):
                module = self.read.get(parameter_name.rpartition(".")[0])
                is_transposed = module is not None and is_conv1d(type(module))
                return weights.dequantized(codes, scales, model_dtype, device, transposed=is_transposed)
            return weights.pre_quantized(codes, scales, device)
        transposed = self.is_stored_transposed(parameter_name)
        if self.config.has_fp16_weight:
            parameter = weights.sixteen_bit(source, transposed=transposed, model_dtype=model_dtype, device=device)
            self.health.watch_rows(parameter_name, parameter.detach())
            return parameter
        return weights.quantize(
            source,
            transposed=transposed,
            model_dtype=model_dtype,
            device=device,
            name=parameter_name,
            health=self.health,
        )

    # --- After loading --------------------------------------------------------------------------------------------

    def postprocess_model(self, model: nn.Module, *, locate: Callable[[str], dict[str, Any]] | None = None) -> None:
        """Marks the model as users of bitsandbytes expect it, and reports bad values.

        Args:
            model: Changed in place.
            locate: The location of a parameter's tensor, for errors: "tensor", "path" and "offset".

        Raises:
            NonFiniteWeightError: A weight has NaN, infinity, or a value beyond fp16 (`strict` only).
        """
        self.health.raise_or_warn(strict=self.strict, locate=locate)
        model.is_loaded_in_8bit = True  # type: ignore[assignment]
        model.is_8bit_serializable = self.is_serializable  # type: ignore[assignment]

    @property
    def is_serializable(self) -> bool:
        return requirements.is_serializable()

    @property
    def is_trainable(self) -> bool:
        return requirements.is_trainable()

    def is_stored_transposed(self, parameter_name: str) -> bool:
        """Whether this weight is stored as [in, out]: a Conv1D's or some experts', unless the checkpoint is int8."""
        owner = parameter_name.rpartition(".")[0]
        if owner in self.experts:
            return not self.pre_quantized and self.experts[owner].was_transposed
        module = self.converted.get(owner)
        return module is not None and not self.pre_quantized and is_conv1d(original_class(module))

    def _check_placement(self, device_map: DeviceMap) -> None:
        if not self.config.fp32_cpu_offload:
            requirements.refuse_off_device([*self.converted, *self.experts], device_map)
