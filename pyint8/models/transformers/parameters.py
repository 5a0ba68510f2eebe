"""Makes each parameter from the stream when transformers' loop asks for it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint, Entry
from pyint8.errors import QuantizationStateError
from pyint8.models.assembly import Assembly, Destination, ExpertPart
from pyint8.models.transformers.compat import converts_on_cpu, expand_device_map, fixed_dtypes
from pyint8.models.transformers.device_worker import DeviceWorker
from pyint8.models.transformers.fusion import expert_parts, find_parts
from pyint8.models.transformers.plan import LoadPlan, Target
from pyint8.placement.device_map import landing_device
from pyint8.quantizer import EXPERT_SCALES, Int8Quantizer, find_entry_point
from pyint8.report import Recorder
from pyint8.streaming.lane import reserve_memory
from pyint8.streaming.preparation import Preparation
from pyint8.streaming.requests import Part, TensorRequest, ToDtype
from pyint8.streaming.stream import TensorStream


def find_destinations(
    plan: LoadPlan, dtypes: Mapping[str, torch.dtype], device_map: Mapping[str, Any] | None
) -> dict[str, Destination]:
    """Destinations of all parameters; devices by transformers' own expansion of the map."""
    names = [name for target in plan.targets.values() for name in target.makes() if name in dtypes]
    return {
        name: Destination(landing_device(device), dtypes[name], on_disk=device == "disk")
        for name, device in expand_device_map(device_map, names).items()
    }


def find_dtypes(
    model: Any, parameters: Mapping[str, torch.Tensor], dtype: torch.dtype, quantizer: Int8Quantizer
) -> dict[str, torch.dtype]:
    """The dtype that each parameter is loaded as, or quantized from, by the rules of transformers' loading loop."""
    own = {
        name: dtype if quantizer.check_quantized_param(name) or quantizer.quantizes_experts(name) else parameter.dtype
        for name, parameter in parameters.items()
    }
    return own | fixed_dtypes(model, dtype, parameters)


class ParameterMaker:
    """The streams of one load, one for each GPU, and the parameters made of them.

    Where there are several that do not serve themselves, each has a thread that makes its parameters, so that all are
    fed at once.

    Args:
        plan: What every tensor is for.
        model: On meta, its modules reconciled with the checkpoint.
        checkpoint: Where the bytes lie.
        destinations: Where parameters go, and in which dtype.
        quantizer: Makes int8 parameters.
        recorder: Counts bytes and parameters.
        preparation: What the load has started already; its transport is taken over.
        most_bytes: Of parameters on each GPU at a time: they are released. None for all of them.
    """

    def __init__(
        self,
        plan: LoadPlan,
        model: Any,
        checkpoint: Checkpoint,
        destinations: dict[str, Destination],
        quantizer: Int8Quantizer,
        recorder: Recorder,
        preparation: Preparation,
        most_bytes: int | None = None,
    ) -> None:
        self._plan = plan
        self._model = model
        self._checkpoint = checkpoint
        self._destinations = destinations
        self._quantizer = quantizer
        self._recorder = recorder
        self._is_bounded = most_bytes is not None
        self._makers: dict[torch.device, DeviceWorker] = {}
        self._assembly = Assembly(quantizer, recorder)
        self._experts: dict[str, list[ExpertPart]] = {}
        self._groups = self._grouped()
        requests = {name: self._requests(target) for name, target in plan.targets.items()}
        # Of the entries that the stream is asked for: elements of a stack have names of their own.
        self._entry_names = {name: list(dict.fromkeys(r.entry.name for r in each)) for name, each in requests.items()}
        wanted = {device: [r for t in group for r in requests[t.name]] for device, group in self._groups.items()}
        recorder.expect(sum(request.entry.nbytes for each in wanted.values() for request in each))
        self._streams: dict[torch.device, TensorStream] = {}
        every = itertools.chain.from_iterable(wanted.values())
        self._transport, early, self._begun = preparation.take_over(len(self._groups), every)
        try:
            if not preparation.reserves_memory and most_bytes is None:
                _reserve_memory(itertools.chain.from_iterable(wanted.values()))
            for device, asked in wanted.items():
                mine = early
                if len(wanted) > 1:
                    names = [name for name, tensor in early.items() if tensor.lane.device == device]
                    mine = {name: early.pop(name) for name in names}
                self._streams[device] = TensorStream(
                    asked,
                    self._transport,
                    recorder=recorder,
                    early=mine,
                    begun=self._begun.get(device),
                    quantizer=find_entry_point(),
                    most_bytes=most_bytes,
                )
            self._transport.discard(early)  # of GPUs that get nothing
        except BaseException:
            self.close()
            raise
        self._serve_themselves = all(stream.serves_itself for stream in self._streams.values())

    def close(self) -> None:
        """Gives back threads, files and memory; the report keeps what the engine did."""
        self._recorder.set_engine(self._transport.stats())
        for maker in self._makers.values():
            maker.stop()
        self._transport.close()  # ends their waits
        for maker in self._makers.values():
            maker.join()
        for stream in self._streams.values():
            stream.close()
        for pour in self._begun.values():
            pour.close()
        self._begun = {}
        self._recorder.add_spans_later(self._transport.spans())
        self._makers.clear()  # breaks a reference cycle
        self._streams.clear()

    def finish(self) -> None:
        """Waits for the values of parameters that were handed out before they had come."""
        for stream in self._streams.values():
            stream.finish()

    def wait(self, name: str) -> None:
        """Waits for the values of a target's parameters."""
        self._stream_of(name).wait(self._entry_names[name])

    def release(self, name: str) -> None:
        """Makes room for other parameters, where that is bounded: a target's were waited for, and are used up."""
        self._stream_of(name).release(self._entry_names[name])

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        """The parameters of one target, by name; targets are taken in the order of the plan.

        Args:
            name: The target's.
            loading_info: transformers', which takes the errors of conversions, or None to have them raised.
        """
        if len(self._groups) == 1 or self._serve_themselves or self._is_bounded:
            return self._make(name, self._stream_of(name), loading_info)
        if not self._makers:
            for gpu, group in self._groups.items():
                make = partial(self._make, stream=self._streams[gpu], loading_info=loading_info)
                self._makers[gpu] = DeviceWorker(gpu, [target.name for target in group], make)
        return self._makers[self._landing_device(self._plan.targets[name])].take(name)

    def _stream_of(self, name: str) -> TensorStream:
        if len(self._groups) == 1:
            return next(iter(self._streams.values()))
        return self._streams[self._landing_device(self._plan.targets[name])]

    def _grouped(self) -> dict[torch.device, list[Target]]:
        """Targets by landing device, in order; all in one group unless there are several GPUs."""
        targets = list(self._plan.targets.values())
        groups: dict[torch.device, list[Target]] = {}
        for target in targets:
            groups.setdefault(self._landing_device(target), []).append(target)
        if _are_several_gpus(groups):
            return groups
        return {next((device for device in groups if device.type == "cuda"), torch.device("cpu")): targets}

    def _make(self, name: str, stream: TensorStream, loading_info: Any) -> dict[str, torch.Tensor]:
        target = self._plan.targets[name]
        if loading_info is not None:
            loading_info.unexpected_keys.update(self._plan.also_unexpected)
        if self._stays_on_disk(target):
            loading_info.missing_keys.discard(target.name)
            self._recorder.count("left on disk")
            return {}
        if self._quantizer.check_experts_param(name) and (parts := self._expert_parts(target)):
            return self._assembly.make_experts(name, parts, self._destinations[name], stream)
        if target.converter is not None:
            return self._converted(target, stream, loading_info)
        stored, destination = target.stored(self._checkpoint), self._destinations[name]
        assert stored is not None
        made = self._assembly.make(name, stored, destination, stream)
        if name.endswith(EXPERT_SCALES) and self._quantizer.check_experts_param(name.removesuffix(EXPERT_SCALES)):
            self._quantizer.health.watch_scales(name, made.flatten())
        return {name: made}

    @cached_property
    def _buffers(self) -> set[str]:
        return {name for name, _ in self._model.named_buffers()}

    def _stays_on_disk(self, target: Target) -> bool:
        """Whether accelerate reads it from the checkpoint, whenever a forward pass needs it."""
        stored = target.stored(self._checkpoint)
        if stored is None or target.name in self._buffers:
            return False
        return self._assembly.is_left_on_disk(target.name, stored, self._destinations[target.name])

    def _requests(self, target: Target) -> list[TensorRequest]:
        if self._stays_on_disk(target):
            return []
        if self._quantizer.check_experts_param(target.name) and (target.converter or self._expert_parts(target)):
            return self._expert_requests(target)
        stored = target.stored(self._checkpoint)
        if stored is not None:
            return self._assembly.requests(target.name, stored, self._destinations[target.name])
        device, batch = self._landing_device(target), target.name if target.stacks else None
        parts, dtype = self._parts_of(target), self._destinations[target.name].dtype
        return [
            TensorRequest(
                self._checkpoint[name],
                device,
                batch=batch,
                becomes=ToDtype(dtype) if name in parts else None,
                part=parts.get(name),
            )
            for name in target.source_names()
        ]

    def _expert_parts(self, target: Target) -> list[ExpertPart]:
        """What the checkpoint has of experts that become int8, expert by expert; empty where it must be converted."""
        if target.name not in self._experts:
            shape = tuple(self._model.get_parameter(target.name).shape)
            transposed = self._quantizer.is_stored_transposed(target.name)
            self._experts[target.name] = expert_parts(target, self._checkpoint, shape, transposed=transposed)
        return self._experts[target.name]

    def _expert_requests(self, target: Target) -> list[TensorRequest]:
        destination = self._destinations[target.name]
        parts = self._expert_parts(target)
        if not parts:
            batch = target.name if target.stacks else None
            device = self._landing_device(target)
            return [TensorRequest(self._checkpoint[name], device, batch=batch) for name in target.source_names()]
        return self._assembly.expert_requests(target.name, parts, destination)

    def _parts_of(self, target: Target) -> dict[str, Part]:
        """Where each source of a plain merge lies in the parameter; empty for what must be converted or quantized."""
        if target.scales_of or self._quantizer.check_quantized_param(target.name):
            return {}
        return find_parts(target, self._checkpoint, self._destinations[target.name].dtype)

    def _landing_device(self, target: Target) -> torch.device:
        """Where a target lands: on the CPU for conversions that transformers does there to save GPU memory."""
        on_cpu = converts_on_cpu(target.converter)
        return torch.device("cpu") if on_cpu else self._destinations[target.name].device

    def _converted(self, target: Target, stream: TensorStream, loading_info: Any) -> dict[str, torch.Tensor]:
        """The results of the model's own converter (an expert merge, a split), quantized where they should be."""
        if all(stream.lands_in_place(name) for name, _ in target.sources):
            self._recorder.count("converted")
            return {target.name: self._assembly.merged(target.name, self._sources(target), stream)}
        converter = deepcopy(target.converter)
        assert converter is not None
        device, dtype = self._landing_device(target), self._destinations[target.name].dtype
        for name, pattern in target.sources:
            entry = self._checkpoint[name]
            if entry.dtype == "I8" and self._quantizer.pre_quantized:
                raise QuantizationStateError(
                    f"int8 codes cannot be split or fused into {target.name}; quantize the 16-bit checkpoint instead",
                    **entry.location,
                )
            converter.add_tensor(target.name, name, pattern, partial(self._read, stream, name, device, dtype))
        made = converter.convert(
            target.name, model=self._model, config=self._model.config, hf_quantizer=None, loading_info=loading_info
        )
        sources = self._sources(target)
        results: dict[str, torch.Tensor] = {}
        for made_name, value in made.items():
            if self._quantizer.check_experts_param(made_name):
                whole = value[0] if isinstance(value, list) else value
                self._recorder.count("converted")
                results |= self._assembly.experts_of(made_name, whole, self._destinations[made_name])
            else:
                results[made_name] = self._finished(made_name, value, sources)
        return results

    def _sources(self, target: Target) -> list[Entry]:
        return [self._checkpoint[name] for name, _ in target.sources]

    def _read(self, stream: TensorStream, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A source of a conversion as transformers would pass it: on its device, in the target's dtype."""
        return stream.batched(name, dtype).to(device)

    def _finished(self, name: str, value: Any, sources: list[Entry]) -> torch.Tensor:
        """One result of a conversion on its device, quantized if it should be."""
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        self._recorder.count("converted")
        destination = self._destinations.get(name)
        if destination is None:  # no place in the model; transformers reports it
            return tensor
        return self._assembly.finish(name, tensor, destination, sources)


def _reserve_memory(requests: Iterable[TensorRequest]) -> None:
    """What a load needs of each GPU at least."""
    nbytes: Counter[torch.device] = Counter()
    for request in requests:
        if request.device.type == "cuda":
            nbytes[request.device] += request.final_bytes
    for device, total in nbytes.items():
        reserve_memory(device, total)


def _are_several_gpus(devices: Iterable[torch.device]) -> bool:
    """Whether there is more than one GPU, so more than one bus to fill."""
    return sum(device.type == "cuda" for device in devices) > 1
