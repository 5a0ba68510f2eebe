"""Making each parameter when transformers' loop asks for it, from what the stream delivers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.accelerate import expand_device_map

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.config import StreamOptions
from pyint8.errors import QuantizationStateError
from pyint8.models import checks
from pyint8.models.delivery import cast_in_bands, deliver_cast, find_overflow
from pyint8.models.transformers.ahead import MadeAhead
from pyint8.models.transformers.plan import LoadPlan, Target
from pyint8.quantizer import Int8Quantizer, TensorSource
from pyint8.report import LoadReport
from pyint8.streaming import Delivery, EarlyTensor, HeadStart, StreamSource, TensorStream, Transport


@dataclass(frozen=True)
class Place:
    """Where a parameter goes and as what."""

    device: torch.device
    dtype: torch.dtype
    on_disk: bool


def find_places(
    plan: LoadPlan, dtypes: Mapping[str, torch.dtype], device_map: Mapping[str, Any] | None
) -> dict[str, Place]:
    """Devices by transformers' own expansion of the map."""
    names = [name for target in plan.targets.values() for name in target.makes() if name in dtypes]
    return {
        name: Place(torch.device("cpu" if device == "disk" else device), dtypes[name], device == "disk")
        for name, device in expand_device_map(device_map, names).items()
    }


def find_dtypes(
    model: Any, parameters: Mapping[str, torch.Tensor], dtype: torch.dtype, quantizer: Int8Quantizer
) -> dict[str, torch.dtype]:
    """What each of `model`'s parameters is loaded as, or quantized from: by the rule of transformers' loading loop."""
    fixed = model._get_dtype_plan(dtype)
    pattern, group_names, _ = build_glob_alternation(list(fixed)) if fixed else (None, {}, None)

    def dtype_of(name: str, parameter: torch.Tensor) -> torch.dtype:
        match = pattern.search(name) if pattern is not None else None
        if match is not None:
            return fixed[group_names[match.lastgroup]]  # type: ignore[no-any-return]
        return dtype if quantizer.check_quantized_param(name) else parameter.dtype

    return {name: dtype_of(name, parameter) for name, parameter in parameters.items()}


class ParameterMaker:
    """The streams of one load, one for each GPU, and the parameters made of them.

    Where there are several, each has a thread that makes its parameters, so that all are fed at once.

    Args:
        plan: Every tensor's place.
        model: On meta, its modules settled.
        checkpoint: Where the bytes lie.
        places: Where parameters go and as what.
        quantizer: Makes int8 parameters.
        report: Counts.
        options: How to move bytes.
        on_bytes: Called with numbers of bytes as they land, from one thread at a time.
        on_total: Called once with the number of bytes that will be read.
        head_start: What was begun before there was a plan; taken over.
    """

    def __init__(
        self,
        plan: LoadPlan,
        model: Any,
        checkpoint: Checkpoint,
        places: dict[str, Place],
        quantizer: Int8Quantizer,
        report: LoadReport,
        options: StreamOptions,
        on_bytes: Callable[[int], None],
        on_total: Callable[[int], None],
        head_start: HeadStart | None = None,
    ) -> None:
        self._plan = plan
        self._model = model
        self._checkpoint = checkpoint
        self._places = places
        self._quantizer = quantizer
        self._report = report
        self._counting = threading.Lock()
        self._makers: dict[torch.device, MadeAhead] = {}
        self._groups = self._grouped()
        wanted = {device: [d for t in group for d in self._deliveries(t)] for device, group in self._groups.items()}
        on_total(sum(delivery.entry.nbytes for deliveries in wanted.values() for delivery in deliveries))
        early: dict[str, EarlyTensor] = {}
        if head_start is None:
            self._transport = Transport(options, gpus=len(self._groups))
        else:
            self._transport, early = head_start.take()
        self._streams: dict[torch.device, TensorStream] = {}
        count = _one_at_a_time(on_bytes)
        for device, deliveries in wanted.items():
            mine = early if len(wanted) == 1 else {name: t for name, t in early.items() if t.lane.device == device}
            self._streams[device] = TensorStream(
                deliveries, options, on_bytes=count, transport=self._transport, early=mine
            )

    def close(self) -> None:
        """Gives back threads, files and memory; the report keeps what the engine did."""
        self._report.engine = self._transport.engine.stats()
        for maker in self._makers.values():
            maker.stop()
        self._transport.close()  # what they wait for ends here
        for maker in self._makers.values():
            maker.join()
        for stream in self._streams.values():
            stream.close()
        self._makers.clear()  # they know this object
        self._streams.clear()

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        """The parameters of one target, by name; asked for in the order of the plan."""
        if len(self._groups) == 1:
            return self._make(name, next(iter(self._streams.values())), loading_info)
        if not self._makers:
            for gpu, group in self._groups.items():
                make = partial(self._make, stream=self._streams[gpu], loading_info=loading_info)
                self._makers[gpu] = MadeAhead(gpu, [target.name for target in group], make)
        return self._makers[self._landing_device(self._plan.targets[name])].take(name)

    def _grouped(self) -> dict[torch.device, list[Target]]:
        """Targets by where they land, in order; all in one group unless there are several GPUs."""
        targets = list(self._plan.targets.values())
        groups: dict[torch.device, list[Target]] = {}
        for target in targets:
            groups.setdefault(self._landing_device(target), []).append(target)
        if _are_fed_side_by_side(groups):
            return groups
        return {next((device for device in groups if device.type == "cuda"), torch.device("cpu")): targets}

    def _make(self, name: str, stream: TensorStream, loading_info: Any) -> dict[str, torch.Tensor]:
        target = self._plan.targets[name]
        loading_info.unexpected_keys.update(self._plan.also_unexpected)
        if self._stays_on_disk(target):
            loading_info.missing_keys.discard(target.name)
            self._count("left on disk")
            return {}
        if target.converter is not None:
            return self._converted(target, stream, loading_info)
        assert target.source is not None
        entry, place = self._checkpoint[target.source], self._places[target.name]
        if self._takes_codes(target):
            return {target.name: self._quantized(target, stream, entry, place)}
        self._count("as stored" if entry.torch_dtype == place.dtype else "cast")
        health = self._quantizer.health
        return {target.name: deliver_cast(stream, entry, target.name, place.dtype, place.device, health)}

    @cached_property
    def _buffers(self) -> set[str]:
        return {name for name, _ in self._model.named_buffers()}

    def _count(self, kind: str) -> None:
        with self._counting:
            self._report.tensors[kind] += 1

    def _stays_on_disk(self, target: Target) -> bool:
        """Whether accelerate will read it from the checkpoint itself, whenever a forward pass needs it."""
        source = target.source
        return (
            source is not None
            and self._places[target.name].on_disk
            and target.name not in self._buffers
            and not self._takes_codes(target)
            and self._checkpoint[source].path.endswith(".safetensors")
        )

    def _deliveries(self, target: Target) -> list[Delivery]:
        if self._stays_on_disk(target):
            return []
        deliveries = []
        batch = target.name if target.stacks else None
        for name in target.collected():
            entry, device, in_bands = self._checkpoint[name], self._landing_device(target), False
            if name == target.format:
                device = torch.device("cpu")  # one byte to look at
            elif name == target.source:
                dtype = self._places[target.name].dtype
                codes = self._takes_codes(target)
                in_bands = self._quantizer.reads_bands if codes else cast_in_bands(entry, dtype)
            deliveries.append(Delivery(entry, device, in_bands, batch))
        return deliveries

    def _landing_device(self, target: Target) -> torch.device:
        """Some conversions need too much memory for a GPU; transformers does them on the CPU."""
        on_cpu = getattr(target.converter, "force_cpu", False)
        return torch.device("cpu") if on_cpu else self._places[target.name].device

    def _takes_codes(self, target: Target) -> bool:
        """Whether it becomes an int8 weight, or is made of one that the checkpoint has."""
        dequantized = target.scales is not None and self._quantizer.dequantizes(target.name)
        return dequantized or self._quantizer.check_quantized_param(target.name)

    def _quantized(self, target: Target, stream: TensorStream, entry: Entry, place: Place) -> torch.Tensor:
        self._count(self._quantizer.kind_of(target.name))
        if target.format is not None:
            checks.require_row_major(int(stream.whole(target.format)), entry)
        return self._quantizer.create_quantized_param(
            target.name,
            StreamSource(stream, entry),
            scales=None if target.scales is None else stream.whole(target.scales),
            model_dtype=place.dtype,
            device=place.device,
        )

    def _converted(self, target: Target, stream: TensorStream, loading_info: Any) -> dict[str, torch.Tensor]:
        """What the model's own converter (an expert merge, a split) makes, then quantized where that is wanted."""
        converter = deepcopy(target.converter)
        assert converter is not None
        device, dtype = self._landing_device(target), self._places[target.name].dtype
        for name, pattern in target.sources:
            entry = self._checkpoint[name]
            if entry.dtype == "I8" and self._quantizer.pre_quantized:
                raise QuantizationStateError(
                    f"int8 codes cannot be split or fused into {target.name}; quantize the 16-bit checkpoint instead",
                    **entry.place,
                )
            converter.add_tensor(target.name, name, pattern, partial(self._read, stream, name, device, dtype))
        made = converter.convert(
            target.name, model=self._model, config=self._model.config, hf_quantizer=None, loading_info=loading_info
        )
        sources = [self._checkpoint[name] for name, _ in target.sources]
        return {name: self._finished(name, value, sources) for name, value in made.items()}

    def _read(self, stream: TensorStream, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A source of a conversion, as transformers would hand it over: on its device, in the target's dtype."""
        return stream.batched(name, dtype).to(device)

    def _finished(self, name: str, value: Any, sources: list[Entry]) -> torch.Tensor:
        """One result of a conversion, quantized where that is wanted, on its device."""
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        self._count("converted")
        place = self._places.get(name)
        if place is None:  # no place in the model; transformers says so
            return tensor
        if not self._quantizer.check_quantized_param(name):
            tensor = tensor.to(place.device)
            dtypes = {entry.torch_dtype for entry in sources}
            self._quantizer.health.watch_cast(name, tensor, dtypes, partial(find_overflow, sources))
            return tensor
        return self._quantizer.create_quantized_param(
            name, TensorSource(tensor), model_dtype=place.dtype, device=place.device
        )


def _one_at_a_time(on_bytes: Callable[[int], None]) -> Callable[[int], None]:
    lock = threading.Lock()

    def call(nbytes: int) -> None:
        with lock:
            on_bytes(nbytes)

    return call


def _are_fed_side_by_side(devices: Iterable[torch.device]) -> bool:
    """Whether there is more than one bus to fill."""
    return sum(device.type == "cuda" for device in devices) > 1
