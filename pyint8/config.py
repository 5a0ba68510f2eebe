"""What to quantize (`Int8Config`) and how to move bytes (`StreamOptions`).

This module is the only reader of `PYINT8_*` environment variables, and imports nothing heavy.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from pyint8.errors import OptionError
from pyint8.host.cpus import usable_cpus
from pyint8.host.processes import processes
from pyint8.host.variables import parse, require_gpus, require_int

logger = logging.getLogger(__name__)

METHOD = "pyint8"
"""The name under which transformers knows pyint8's quantizer."""

_register: Callable[[], None] | None = None
_MIB = 1 << 20
# See docs/performance.md, "Threads on 16 CPUs".
_THREADS_FOR_A_GPU = 14
# More for each further GPU: docs/performance.md, "Threads for several GPUs".
_THREADS_FOR_ANOTHER = 12
# However many GPUs, in all processes of a host: more threads copy no faster out of the page cache, and their slots
# would not stay in the last-level cache. See docs/performance.md, "Threads for several GPUs".
_MOST_THREADS = 32
# Of all slots together, for any number of GPUs, and the limits of one slot: docs/performance.md, "Slots".
_RING_BYTES = 84 * _MIB
_LEAST_SLOT = _MIB // 4
_MOST_SLOT = 4 * _MIB
# docs/performance.md, "Remote checkpoints".
_REMOTE_THREADS = 32
_REMOTE_SLOT = 8 * _MIB
# For the allocator's rounding and the kernels: docs/performance.md, "Memory beside the scratch".
_DEVICE_EXTRA = 256 * _MIB
_MOST_BORROWED = 7  # roads to a GPU beside its own (csrc/core/transfer/ring.hpp)
_ENVIRONMENT_PREFIX = "PYINT8_"
_CACHE_BYTES = "PYINT8_CACHE_BYTES"
_EXPERTS = "PYINT8_EXPERTS"
_FOR_TESTS = ("PYINT8_TEST_", "PYINT8_REQUIRE_")


@dataclass(frozen=True)
class Int8Config:
    """LLM.int8() as transformers' `BitsAndBytesConfig(load_in_8bit=True)` has it, under the same defaults.

    It can be given to transformers itself, for code that is not yours to change otherwise:
    `from_pretrained(path, quantization_config=pyint8.Int8Config())`. (Not for checkpoints that are int8 already, which
    bring their own configuration, of bitsandbytes; `pyint8.takeover` serves those.)

    Args:
        threshold: Activation columns with a value above this are multiplied in 16 bit (`llm_int8_threshold`).
        skip_modules: Names of modules to leave unquantized (`llm_int8_skip_modules`). None finds them: tied weights
            and the output head. An empty sequence skips nothing.
        has_fp16_weight: Keep the weights in 16 bit and quantize in every forward pass (`llm_int8_has_fp16_weight`).
        fp32_cpu_offload: Allow a device map to put modules, unquantized, on the CPU or the disk beside a GPU
            (`llm_int8_enable_fp32_cpu_offload`).
        experts: Quantize the experts of a mixture too, each as a `Linear8bitLt`; their module's class is pyint8's then.
        strict: As `pyint8.load`'s, for `from_pretrained`: raise for weights that cannot be quantized soundly and for
            shards that do not agree with their index, instead of one warning. Not saved with the model.

    Raises:
        OptionError: A value of the wrong type, or a negative threshold.
    """

    threshold: float = 6.0
    skip_modules: Sequence[str] | None = None
    has_fp16_weight: bool = False
    fp32_cpu_offload: bool = False
    experts: bool = False
    strict: bool = True

    def __post_init__(self) -> None:
        threshold = self.threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise OptionError(f"threshold is {threshold!r}; it must be a number of at least 0")
        object.__setattr__(self, "threshold", float(threshold))  # bitsandbytes takes no int
        skip = self.skip_modules
        if skip is not None:
            if (
                isinstance(skip, str)
                or not isinstance(skip, Iterable)
                or not all(isinstance(name, str) for name in skip)
            ):
                raise OptionError(f"skip_modules is {skip!r}; it must be a sequence of module names, or None")
            object.__setattr__(self, "skip_modules", tuple(skip))
        for name in ("has_fp16_weight", "fp32_cpu_offload", "experts", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    @property
    def quant_method(self) -> str:
        """The method by which transformers chooses a quantizer; asking for it registers pyint8's there."""
        if _register is not None:
            _register()
        return METHOD

    if not TYPE_CHECKING:  # type checkers know the fields

        def __getattr__(self, name: str) -> Any:
            return bitsandbytes_field(self, name)

    def to_dict(self) -> dict[str, Any]:
        """The corresponding fields of `BitsAndBytesConfig`, as transformers writes them."""
        skip = self.skip_modules
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": None if skip is None else list(skip),
            "llm_int8_enable_fp32_cpu_offload": self.fp32_cpu_offload,
            "llm_int8_has_fp16_weight": self.has_fp16_weight,
        }


def set_registration(register: Callable[[], None]) -> None:
    """Sets the function that registers pyint8's quantizer with transformers; it must be idempotent.

    That function lies above this module and imports transformers, so `pyint8/__init__` sets it.
    """
    global _register
    _register = register


def int8_config_of(theirs: Any) -> Int8Config:
    """The `Int8Config` for a `BitsAndBytesConfig` of 8 bit."""
    return Int8Config(
        threshold=theirs.llm_int8_threshold,
        skip_modules=theirs.llm_int8_skip_modules,
        has_fp16_weight=theirs.llm_int8_has_fp16_weight,
        fp32_cpu_offload=theirs.llm_int8_enable_fp32_cpu_offload,
    )


def bitsandbytes_field(config: Any, name: str) -> Any:
    """A field by its name in `BitsAndBytesConfig`, for code of models that looks at `config.quantization_config`.

    Raises:
        AttributeError: There is no such field.
    """
    if name.startswith(("load_in_", "llm_int8_")):
        fields = {"load_in_8bit": True, "load_in_4bit": False, **config.to_dict()}
        if name in fields:
            return fields[name]
    raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True)
class StreamOptions:
    """How bytes travel from the files to their device. docs/performance.md has the experiments behind the defaults.

    Args:
        threads: Workers that read, 1 to 1024. None means all CPUs this process may use (affinity and cgroup) but two,
            at most 14, 12 more for each further GPU, and 32 in all; of up to four CPUs, all. The processes that
            torchrun starts on a host (LOCAL_WORLD_SIZE) share these numbers. For a remote checkpoint None means 32.
        slots_per_thread: Pinned slots of each worker, for a GPU: one that is being filled, the others on their way. 1
            to 64; default 2. A remote checkpoint always has one.
        slot_bytes: Size of one slot and of the largest single read, in bytes: a multiple of 4096, 8192 to 2^30. None
            means as large as lets all slots of a host stay inside its last-level cache together, 4 MiB at most; for a
            remote checkpoint 8 MiB.
        device_scratch: GPU memory, in bytes, for weights on their way to int8; a larger weight is quantized in bands
            of rows. 1 MiB to 2^40; default 256 MiB.
        host_scratch: The same for weights that are quantized on the CPU; default 32 MiB.
        direct_io: Read what is not in the page cache with O_DIRECT, where the file system can: for a cold checkpoint
            that should not displace other files there. Default False.
        libcuda: The driver library to open, by name or path. Default "libcuda.so.1".
        timeline: Note in `LoadReport.timeline` what is done when, for a picture. Default False.
        checksums: Compare what is read with the checksums of the checkpoint, where it has some. Default True.
        borrow_gpus: Numbers of other GPUs, as torch counts them, over whose buses a load onto one GPU may read too:
            each takes an equal share of the bytes into at most 128 MiB of its memory, and hands them on over NVLink.
            One that cannot is left out, with a warning. Seven at most; default none. Loads onto several GPUs or the
            CPU, or by ranks, have no use for it, and say so.

    Raises:
        OptionError: A value out of its range, naming the option.
    """

    threads: int | None = None
    slots_per_thread: int = 2
    slot_bytes: int | None = None
    device_scratch: int = 256 * _MIB
    host_scratch: int = 32 * _MIB
    direct_io: bool = False
    libcuda: str = "libcuda.so.1"
    timeline: bool = False
    checksums: bool = True
    borrow_gpus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_int("threads", self.threads, 1, 1024, optional=True)
        require_int("slots_per_thread", self.slots_per_thread, 1, 64)
        require_int("slot_bytes", self.slot_bytes, 2 * 4096, 1 << 30, optional=True)
        if self.slot_bytes is not None and self.slot_bytes % 4096:
            raise OptionError(f"slot_bytes is {self.slot_bytes}; it must be a multiple of 4096")
        require_int("device_scratch", self.device_scratch, _MIB, 1 << 40)
        require_int("host_scratch", self.host_scratch, _MIB, 1 << 40)
        for name in ("direct_io", "timeline", "checksums"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        require_gpus("borrow_gpus", self.borrow_gpus, _MOST_BORROWED)
        if not isinstance(self.libcuda, str):
            raise OptionError(f"libcuda is {self.libcuda!r}; it must be the name or path of a library")

    @property
    def device_bytes(self) -> int:
        """What a load takes on a GPU beside the model: scratch, plus the needs of the allocator and the kernels."""
        return self.device_scratch + _DEVICE_EXTRA

    def worker_threads(self, gpus: int = 1, *, gathers: bool = False) -> int:
        """`threads`, or its default on this machine for a load onto so many GPUs, or of a rank that `gathers`."""
        if self.threads is not None:
            return self.threads
        sharing = processes().on_host
        cpus = max(1, usable_cpus() // sharing)
        most = max(1, _MOST_THREADS // sharing)
        wanted = _THREADS_FOR_A_GPU + _THREADS_FOR_ANOTHER * max(0, gpus - 1)
        used = min(cpus - 2, cpus * 5 // 8) if gathers else cpus - 2
        return min(wanted, most, max(min(4, cpus), used))

    def for_ranks(self) -> StreamOptions:
        """The same with the defaults for ranks that load together (docs/performance.md, "Ranks").

        A rank's workers share its CPUs with threads that build the model, ask for more, gather, and make int8 of it.
        """
        return replace(self, threads=self.worker_threads(gathers=True))

    def slot_size(self, threads: int) -> int:
        """`slot_bytes`, or its default for so many workers."""
        if self.slot_bytes is not None:
            return self.slot_bytes
        share = _RING_BYTES // (processes().on_host * threads * self.slots_per_thread)
        return max(_LEAST_SLOT, min(_MOST_SLOT, share // _LEAST_SLOT * _LEAST_SLOT))

    def for_remote(self) -> StreamOptions:
        """The same with the defaults for what comes over a network (docs/performance.md, "Remote checkpoints").

        More readers ask for larger ranges, each into one slot: it waits for the network, never for the bus.

        Raises:
            OptionError: An option that is for files.
        """
        if self.direct_io:
            raise OptionError("direct_io is for files on a disk; leave it out for a checkpoint that is remote")
        sharing = processes().on_host
        threads = max(4, _REMOTE_THREADS // sharing) if self.threads is None else self.threads
        return replace(self, threads=threads, slot_bytes=self.slot_bytes or _REMOTE_SLOT, slots_per_thread=1)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> StreamOptions:
        """The defaults, changed by `PYINT8_THREADS`, `PYINT8_SLOT_BYTES` and so on for every option.

        Raises:
            OptionError: A value that cannot be read or is out of range, naming the variable.
        """
        values: dict[str, Any] = {}
        known = {_ENVIRONMENT_PREFIX + field.name.upper(): field for field in fields(cls)}
        _warn_of_unknown(environment, known)
        for variable, field in known.items():
            text = environment.get(variable)
            if text is None:
                continue
            values[field.name] = parse(variable, text, type(field.default))
            try:
                cls(**{field.name: values[field.name]})
            except OptionError as error:
                raise OptionError(f"environment variable {variable}: {error}") from None
        return cls(**values)


def wants_experts(theirs: Any, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether experts become int8: `Int8Config.experts`, or for another library's configuration `PYINT8_EXPERTS`.

    Raises:
        OptionError: The variable is not 0 or 1.
    """
    own = theirs.experts if isinstance(theirs, Int8Config) else None
    return bool(parse(_EXPERTS, environment.get(_EXPERTS, "0"), bool)) if own is None else own


def cache_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """What the cache of int8 forms may take, in bytes: `PYINT8_CACHE_BYTES`, or 200 GB.

    Raises:
        OptionError: It is no number of bytes.
    """
    text = environment.get(_CACHE_BYTES)
    if text is None:
        return 200 * 10**9
    if not text.isdecimal():
        raise OptionError(f"environment variable {_CACHE_BYTES} is {text!r}; it must be a number of bytes")
    return int(text)


def cache_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Where the cache of int8 forms is unless a load says so: `pyint8` in the user's folder for caches (XDG)."""
    return os.path.join(environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pyint8")


def _warn_of_unknown(environment: Mapping[str, str], options: Iterable[str]) -> None:
    """One warning for each unknown `PYINT8_*` variable, with the nearest known one."""
    known = {name.removeprefix(_ENVIRONMENT_PREFIX): name for name in (*options, _CACHE_BYTES, _EXPERTS)}
    for variable in sorted(environment.keys() - set(known.values())):
        if variable.startswith(_ENVIRONMENT_PREFIX) and not variable.startswith(_FOR_TESTS):
            near = difflib.get_close_matches(variable.removeprefix(_ENVIRONMENT_PREFIX), known, n=1)
            advice = f"did you mean {known[near[0]]}?" if near else f"there are {', '.join(known.values())}"
            logger.warning("the environment variable %s means nothing to pyint8; %s", variable, advice)
