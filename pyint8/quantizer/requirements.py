"""What must be installed, and what must not be asked for, before anything is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from packaging.version import Version

from pyint8.config import Int8Config
from pyint8.errors import DependencyVersionError, MissingDependencyError, OptionError, PlacementError
from pyint8.host.packages import forget_versions, installed_version
from pyint8.placement.device_map import OFF_DEVICE, DeviceMap, device_name, device_of

MINIMUM_BITSANDBYTES = "0.37.2"
_MINIMUM_TRAINABLE = "0.37.0"
_OTHER_FRAMEWORKS = {"from_tf": "TensorFlow", "from_flax": "Flax"}


def require_packages() -> None:
    """Raises MissingDependencyError or DependencyVersionError, naming the command that fixes it."""
    if installed_version("accelerate") is None:
        raise MissingDependencyError("loading in int8 needs accelerate: `pip install accelerate`")
    version = installed_version("bitsandbytes")
    if version is None:
        raise MissingDependencyError("loading in int8 needs bitsandbytes: `pip install -U bitsandbytes`")
    if version < Version(MINIMUM_BITSANDBYTES):
        forget_versions()
        raise DependencyVersionError(
            f"bitsandbytes {version} is too old for int8 weights: at least {MINIMUM_BITSANDBYTES} is needed; "
            "`pip install -U bitsandbytes`"
        )


def refuse_other_frameworks(arguments: dict[str, Any]) -> None:
    """Raises OptionError where `from_tf` or `from_flax` is asked for."""
    for name, framework in _OTHER_FRAMEWORKS.items():
        if arguments.get(name):
            raise OptionError(
                f"{name}=True: int8 models are not made from {framework} weights; convert them to PyTorch first "
                "(load them with transformers, then save_pretrained)"
            )


def refuse_contradictions(config: Int8Config, *, pre_quantized: bool = False) -> None:
    """Raises OptionError for options that cannot hold together, or not with a checkpoint that is int8 already."""
    if config.has_fp16_weight and pre_quantized:
        raise OptionError(
            "has_fp16_weight keeps weights in 16 bit, and the checkpoint is int8 already; leave it out, or load the "
            "checkpoint that the int8 one was made of"
        )
    if config.has_fp16_weight and config.experts:
        raise OptionError("has_fp16_weight keeps weights in 16 bit, and experts makes some int8: give one of them")


def refuse_off_device(converted: Iterable[str], device_map: DeviceMap) -> None:
    """Raises PlacementError where a map that is not all of the CPU puts modules on the CPU or the disk."""
    devices = {device_name(device) for device in device_map.values()}
    off = devices & set(OFF_DEVICE)
    lost = [name for name in converted if device_name(device_of(name, device_map)) in OFF_DEVICE]
    if devices == {"cpu"} or not lost:
        return
    others = devices - off
    where = " or ".join({"cpu": "the CPU", "disk": "the disk"}[device] for device in sorted(off))
    advice = "Free memory on the device" if others else 'Put all of the model on the CPU, device_map="cpu"'
    raise PlacementError(
        f"the device map puts {len(lost)} modules that are to be quantized on {where}"
        f"{' beside another device' if others else ''} ({', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}). "
        f"{advice}, or pass Int8Config(fp32_cpu_offload=True) to keep such modules there, unquantized"
    )


def is_serializable() -> bool:
    """Whether the installed bitsandbytes can save int8 weights (after 0.37.2)."""
    version = installed_version("bitsandbytes")
    return version is not None and version > Version(MINIMUM_BITSANDBYTES)


def is_trainable() -> bool:
    """Whether adapters can be trained on int8 weights of the installed bitsandbytes (0.37.0 and later)."""
    version = installed_version("bitsandbytes")
    return version is not None and version >= Version(_MINIMUM_TRAINABLE)
