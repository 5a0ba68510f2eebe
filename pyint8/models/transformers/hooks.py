"""Translates transformers' quantizer hooks to the int8 lifecycle, and connects the stream.

transformers constructs this class by its registered name and calls its hooks in from_pretrained. At the end its own
quantizer replaces ours on the model: a loaded model carries nothing of pyint8.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers import register_quantization_config, register_quantizer

from pyint8.config import METHOD, Int8Config, bitsandbytes_field, int8_config_of, wants_experts
from pyint8.errors import ModelNotSupportedError, OptionError
from pyint8.models.checks import has_expert_codes, has_whole_experts
from pyint8.models.transformers.buffers import warn_of_unfilled_buffers
from pyint8.models.transformers.compat import (
    ALL_EXPERTS_FUNCTIONS,
    Bnb8BitHfQuantizer,
    QuantizationConfigMixin,
    infer_auto_device_map,
    kept_in_fp32,
    reset_experts_implementation,
    set_used_conversions,
    should_convert_module,
    tied_weights,
    unsplit_modules,
)
from pyint8.models.transformers.conversion import FurtherSources, PlannedConverter, PlannedRenaming
from pyint8.models.transformers.expert_codes import EXPERTS
from pyint8.models.transformers.parallel import refuse_split_models
from pyint8.models.transformers.session import LoadSession
from pyint8.models.unquantized import report_unquantized
from pyint8.placement.device_map import check_device_map
from pyint8.placement.tight import tight_memory
from pyint8.quantizer import Int8Quantizer, tensor_bytes
from pyint8.report import announce

logger = logging.getLogger(__name__)

_KEPT = "in its class's list of modules to keep in float32"
# Fields of a BitsAndBytesConfig that its constructor does not take, or that are implied.
_HIDDEN = ("load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit", "quant_method")


def _refuse_codes(experts: torch.nn.Module, *_: Any) -> None:
    """The forward pass of experts that say that they are int8, and are not of our class."""
    raise ModelNotSupportedError(
        f"the checkpoint of this {type(experts).__name__} has int8 experts, and transformers has taken their codes for "
        "weights; load it with pyint8.load, or within pyint8.takeover()"
    )


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _refuse_codes)


@register_quantization_config(METHOD)
class StreamedInt8Config(QuantizationConfigMixin):
    """Replaces the configuration of a pre-quantized checkpoint, so that from_pretrained uses pyint8's quantizer.

    Args:
        fields: The fields of a `BitsAndBytesConfig`.
    """

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD
        self.fields = fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.fields

    def __getattr__(self, name: str) -> Any:
        return bitsandbytes_field(self, name)


def genuine_config(config: Any) -> BitsAndBytesConfig:
    """The `BitsAndBytesConfig` for an `Int8Config` or a `StreamedInt8Config`; one is returned as it is."""
    if isinstance(config, BitsAndBytesConfig):
        return config
    fields = {name: value for name, value in config.to_dict().items() if name not in _HIDDEN}
    return BitsAndBytesConfig(load_in_8bit=True, **fields)


@register_quantizer(METHOD)
class StreamedInt8HfQuantizer(Bnb8BitHfQuantizer):
    """transformers' hooks, answered by an `Int8Quantizer` and a `LoadSession`."""

    quantization_config: BitsAndBytesConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        genuine = genuine_config(quantization_config)
        super().__init__(genuine, **kwargs)
        self._was_pre_quantized = pre_quantized = bool(kwargs.get("pre_quantized", True))
        # The session of the pyint8.load that is running, or a new one for a from_pretrained of other code.
        self._is_own_config = isinstance(quantization_config, Int8Config)
        is_strict = self._is_own_config and quantization_config.strict
        self.session = LoadSession.active() or LoadSession.for_drop_in(strict=is_strict)
        self.int8 = Int8Quantizer(
            replace(int8_config_of(genuine), experts=not pre_quantized and wants_experts(quantization_config)),
            pre_quantized=self._was_pre_quantized,
            strict=self.session.request.strict,
        )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        check_device_map(device_map)
        self.session.check_device_map(device_map)
        self.int8.validate_environment(device_map=device_map, **kwargs)
        self._pass_on_device_map(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.int8.update_dtype(dtype)

    def update_device_map(self, device_map: Any) -> Any:
        return self.int8.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        budget = self.session.request.budget
        if not budget.is_exact or budget.per_device is None:
            return self.int8.adjust_max_memory(max_memory)
        blocks = unsplit_modules(self._model)

        def plan(memory: dict[Any, float]) -> dict[str, Any]:
            found: dict[str, Any] = infer_auto_device_map(self._model, memory, blocks, hf_quantizer=self)
            return found

        converted = self._planned.conversion_bytes()
        per_device = {
            device: max(0, size - converted) if isinstance(device, int) else size
            for device, size in budget.per_device.items()
        }
        return tight_memory(self._model, per_device, max_memory, self.tensor_bytes, blocks, plan)

    @cached_property
    def tensor_bytes(self) -> dict[str, int]:
        """What each tensor of the model will take, by name (see `pyint8.quantizer.tensor_bytes`)."""
        return tensor_bytes(self._model, self.int8, self._planned.dtypes, tied_weights(self._model))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.int8.check_quantized_param(param_name)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes for an element, when memory is planned. transformers also reserves that much before it loads; where the
        load has reserved memory already, 0 keeps it from reserving it twice."""
        if self.session.reserves_memory:
            return 0
        if self.session.request.budget.is_exact and param_name in self.tensor_bytes:
            return self.tensor_bytes[param_name] / max(1, param.numel())
        return super().param_element_size(model, param_name, param)  # type: ignore[no-any-return]

    def get_quantize_ops(self) -> None:
        """The parameters come quantized: nothing is left to do."""

    def preprocess_model(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        assert dtype is not None
        refuse_split_models({"distributed_config": getattr(model.config, "distributed_config", None)})
        self._model, self._dtype = model, dtype
        if not checkpoint_files:
            self._become_genuine(model)
            self.preprocess_model(model, dtype=dtype, checkpoint_files=checkpoint_files, **kwargs)
            return
        self.session.open_files(checkpoint_files)
        if self._was_pre_quantized and has_expert_codes(self.session.checkpoint):
            self.int8.config = replace(self.int8.config, experts=True)
        reset_experts_implementation(model, EXPERTS)
        self._name_genuine_config(model)
        super().preprocess_model(model, dtype=dtype, checkpoint_files=checkpoint_files, **kwargs)
        self.session.model_is_built()

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Takes Llama 4's experts apart, where the checkpoint has them so; transformers does it whatever that has."""
        if not has_whole_experts(self.session.checkpoint):
            super()._convert_model_for_quantization(model)

    def _become_genuine(self, model: Any) -> None:
        """Becomes transformers' own quantizer: tensors that are in memory (`state_dict=`) need no stream."""
        self._tell_what_is_not_done()
        self._name_genuine_config(model)
        self.session.model_is_built()
        del self.session, self.int8, self._model, self._dtype, self._was_pre_quantized, self._is_own_config
        self.__class__ = Bnb8BitHfQuantizer

    def _tell_what_is_not_done(self) -> None:
        problem = "weights that are in memory (state_dict=) are quantized by transformers, which"
        if self.int8.config.experts and self._is_own_config:
            advice = "save them, then load that checkpoint, or leave out Int8Config(experts=True)"
            raise OptionError(f"{problem} has no int8 experts; {advice}")
        if self.int8.config.experts:
            logger.warning("%s leaves experts in 16 bit, whatever PYINT8_EXPERTS says", problem)
        if self.int8.strict and self._is_own_config:
            logger.warning("%s does not look for values that int8 cannot hold", problem)

    def _name_genuine_config(self, model: Any) -> None:
        """Replaces our configuration in the copies that some models (T5) made while they were built."""
        for module in model.modules():
            config = vars(module).get("config")
            if config is not None and isinstance(
                getattr(config, "quantization_config", None), (StreamedInt8Config, Int8Config)
            ):
                config.quantization_config = copy.deepcopy(self.quantization_config)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        if plan:  # an empty one changes nothing, so save walking through all parameters
            super().update_parallel_plan(model, plan)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._pass_on_device_map(device_map)
        in_fp32 = kept_in_fp32(model)
        found = self.get_modules_to_not_convert(model, self.quantization_config.llm_int8_skip_modules, in_fp32)
        self.int8.preprocess_model(
            model,
            skip=found,
            device_map=device_map,
            matches=lambda name, patterns: not should_convert_module(name, patterns),
            warn_of_dead=not self._was_pre_quantized,
            facts={"_is_quantized": True},
        )
        for name in self.int8.skipped:
            if not should_convert_module(name, in_fp32):
                self.int8.skipped[name] = _KEPT

    def _pass_on_device_map(self, device_map: Any) -> None:
        if isinstance(device_map, dict):
            self.session.set_device_map(device_map)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Returns our transforms instead of the model's own conversions, which the plan keeps."""
        self._planned = self.session.set_conversions(self._model, weight_conversions, self._dtype, self.int8)
        if self.int8.found:
            self._name_skipped_modules()
        self.session.plan_is_made(self._model, self)
        # For a pre-quantized checkpoint transformers would read all tensors at once, in threads; else only when asked.
        self.pre_quantized = False
        plan = self._planned.plan
        return [PlannedRenaming(plan), PlannedConverter(plan, self.session.make), FurtherSources()]

    def _name_skipped_modules(self) -> None:
        """Lists skipped modules in the configuration and in models' copies of it: a saved model must name them, or its
        floats would be read as codes. The object that was given stays as it is; it may be used for other models."""
        self.quantization_config = copy.deepcopy(self.quantization_config)
        configs = [vars(module).get("config") for module in self._model.modules()]
        for config in (self.quantization_config, *(getattr(one, "quantization_config", None) for one in configs)):
            if isinstance(config, BitsAndBytesConfig):
                config.llm_int8_skip_modules = list(self.int8.skip)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        set_used_conversions(model, self._planned.to_revert())
        genuine = Bnb8BitHfQuantizer(self.quantization_config, pre_quantized=self._was_pre_quantized)
        genuine.modules_to_not_convert = self.int8.skip
        model.hf_quantizer = genuine
        if self.int8.experts:
            model.config.experts_implementation = EXPERTS  # without an underscore it is saved
        report_unquantized(model, self.int8, self.session.recorder.report)
        warn_of_unfilled_buffers(model, self.session.device_map)
        self.session.finish()  # the last bytes may have come only now (see PlannedLoad.make)
        with self.session.recorder.phase("finish"):
            self.int8.postprocess_model(model, locate=self._planned.locate)
        if self.session.is_drop_in:
            announce(self.session.recorder.report, model.name_or_path)
        return model
