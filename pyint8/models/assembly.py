"""From a checkpoint's entries to requests, and from the stream's tensors to parameters, for all kinds of models.

The callers determine what the checkpoint has for a parameter (`Stored`) and where it goes (`Destination`); requesting
it from the stream, and making the parameter, is the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from pyint8.checkpoint import Entry
from pyint8.errors import PlacementError
from pyint8.models import checks
from pyint8.quantizer import (
    ENTRY_POINT,
    EXPERT_SCALES,
    OPERATOR,
    BadWeight,
    Experts,
    Int8Quantizer,
    TensorSource,
    experts_tensors,
    first_overflow,
)
from pyint8.remote.objects import remote_object
from pyint8.report import Recorder
from pyint8.streaming.reading import read_tensor
from pyint8.streaming.requests import Part, TensorRequest, ToDtype, ToInt8, is_plain
from pyint8.streaming.source import StreamSource
from pyint8.streaming.stream import TensorStream

# Smaller tensors are cast whole: they take little memory.
_BAND_WORTHY_BYTES = 1 << 20
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stored:
    """What a checkpoint has for one parameter or buffer that needs no conversion.

    Attributes:
        entry: Its values, or its int8 codes.
        scales: The `SCB` of codes, fp32 [out].
        layout: Their `weight_format`.
    """

    entry: Entry
    scales: Entry | None = None
    layout: Entry | None = None


@dataclass(frozen=True)
class Destination:
    """Where a parameter goes, and in which dtype.

    Attributes:
        device: Where it lands: the CPU for what goes to the disk.
        dtype: Of its unquantized values, which are rounded to it on the way to int8 too.
        on_disk: Whether accelerate keeps it on the disk.
    """

    device: torch.device
    dtype: torch.dtype
    on_disk: bool = False


class ExpertPart(NamedTuple):
    """A tensor of the checkpoint that is some rows of one expert of many.

    Attributes:
        entry: Its values, [rows, in], or [in, rows] if transposed.
        expert: The number of the expert.
        row: The first row.
        transposed: Whether it is stored as [in, rows].
        scales: Of codes, fp32 [rows]; None also where the checkpoint has those of all experts in one.
    """

    entry: Entry
    expert: int
    row: int
    transposed: bool = False
    scales: Entry | None = None

    @property
    def rows(self) -> int:
        return self.entry.torch_shape[1 if self.transposed else 0]


def _is_codes(entry: Entry) -> bool:
    """Whether a tensor that becomes int8 is that already."""
    return entry.dtype == "I8"


def _shape_of(parts: Sequence[ExpertPart]) -> tuple[int, int, int]:
    """[experts, out, in] of what they make."""
    out = sum(part.rows for part in parts if part.expert == 0)
    return 1 + max(part.expert for part in parts), out, parts[0].entry.torch_shape[0 if parts[0].transposed else 1]


class Assembly:
    """Makes the parameters of one load; thread-safe.

    Args:
        quantizer: Decides what becomes int8, and makes it.
        recorder: Counts parameters.
    """

    def __init__(self, quantizer: Int8Quantizer, recorder: Recorder) -> None:
        self._quantizer = quantizer
        self._recorder = recorder

    def is_left_on_disk(self, name: str, stored: Stored, destination: Destination) -> bool:
        """Whether accelerate can read a parameter from the checkpoint itself, whenever a forward pass needs it."""
        in_safetensors = stored.entry.path.endswith(".safetensors")
        is_int8 = self._takes_codes(name, stored) or self._quantizer.check_experts_param(name)
        is_left = destination.on_disk and in_safetensors and not is_int8
        if is_left and remote_object(stored.entry.path) is not None:
            raise PlacementError(
                f'the device map puts {name} on "disk", where every forward pass would read it from the checkpoint, '
                "which is remote; download that, or give the model more memory",
                **stored.entry.location,
            )
        return is_left

    def requests(self, name: str, stored: Stored, destination: Destination) -> list[TensorRequest]:
        """The requests for the stream, in the order in which `make` takes them."""
        entry, device = stored.entry, destination.device
        if self._takes_codes(name, stored):
            in_bands, becomes = self._quantizer.reads_bands, self._becomes(name, entry, destination.dtype)
        else:
            in_bands, becomes = _is_cast_in_bands(entry, destination.dtype), ToDtype(destination.dtype)
        requests = [TensorRequest(entry, device, in_bands, becomes=becomes)]
        if stored.scales is not None:
            as_stored = ToDtype(stored.scales.torch_dtype)
            requests.insert(0, TensorRequest(stored.scales, device, becomes=as_stored))
        if stored.layout is not None:
            requests.insert(0, TensorRequest(stored.layout, _CPU))  # one byte, examined on the host
        return requests

    def make(self, name: str, stored: Stored, destination: Destination, stream: TensorStream) -> torch.Tensor:
        """The parameter: an `Int8Params` for the weight of a converted module, else its values.

        Raises:
            Pyint8Error: See `TensorStream` and `Int8Quantizer.create_quantized_param`.
        """
        if not self._takes_codes(name, stored):
            return self._cast(name, stored.entry, destination, stream)
        self._recorder.count(self._quantizer.kind_of(name))
        if self._quantizer.reads_bands:
            self._recorder.count_quantizer(ENTRY_POINT if stream.makes(stored.entry.name) else OPERATOR)
        if stored.layout is not None:
            checks.require_row_major(int(stream.whole(stored.layout.name)), stored.entry)
        return self._quantizer.create_quantized_param(
            name,
            StreamSource(stream, stored.entry),
            scales=None if stored.scales is None else self._scales(name, stored.scales, stream),
            model_dtype=destination.dtype,
            device=destination.device,
        )

    def finish(
        self, name: str, converted: torch.Tensor, destination: Destination, sources: Sequence[Entry]
    ) -> torch.Tensor:
        """The parameter for the result of a conversion (a merge, a split) of `sources`."""
        if self._quantizer.check_quantized_param(name):
            if self._quantizer.reads_bands:
                self._recorder.count_quantizer(OPERATOR)
            return self._quantizer.create_quantized_param(
                name, TensorSource(converted), model_dtype=destination.dtype, device=destination.device
            )
        tensor = converted.to(destination.device)
        dtypes = {entry.torch_dtype for entry in sources}
        self._quantizer.health.watch_cast(name, tensor, dtypes, partial(_find_overflow, sources))
        return tensor

    def expert_requests(self, name: str, parts: Sequence[ExpertPart], destination: Destination) -> list[TensorRequest]:
        """The requests for the stream of int8 experts, in the order in which `make_experts` takes them."""
        experts, out, inner = _shape_of(parts)
        in_place = all(is_plain(part.entry) and (part.scales is None or is_plain(part.scales)) for part in parts)
        shape, scales_name, device = (experts, out, inner), name + EXPERT_SCALES, destination.device
        codes, as_stored = ToDtype(torch.int8), ToDtype(torch.float32)
        int8 = {transposed: ToInt8(destination.dtype, transposed) for transposed in (False, True)}
        requests: list[TensorRequest] = []
        for entry, expert, first_row, transposed, scales in parts:
            row = expert * out + first_row
            if scales is not None:
                place = Part(scales_name, shape[:2], row) if in_place else None
                requests.append(TensorRequest(scales, device, becomes=as_stored, part=place))
            place = Part(name, shape, row * inner) if in_place else None
            has_codes = _is_codes(entry)
            becomes = codes if has_codes else int8[transposed]
            requests.append(TensorRequest(entry, device, not has_codes, None, becomes, place))
        return requests

    def make_experts(
        self, name: str, parts: Sequence[ExpertPart], destination: Destination, stream: TensorStream
    ) -> dict[str, torch.Tensor]:
        """Codes int8 [experts, out, in] and scales fp32 [experts, out] of the experts of a module, by their names.

        Raises:
            Pyint8Error: See `TensorStream`.
        """
        self._recorder.count("int8 experts")
        if self._quantizer.reads_bands:
            self._recorder.count_quantizer(ENTRY_POINT if stream.makes(parts[0].entry.name) else OPERATOR)
        if stream.lands_in_place(parts[0].entry.name):
            return self._landed_experts(name, parts, stream)
        made = Experts(name, _shape_of(parts), destination.dtype, destination.device, self._quantizer.health)
        for part in parts:
            source = StreamSource(stream, part.entry)
            if not _is_codes(part.entry):
                made.put(source, part.expert, part.row, transposed=part.transposed, name=part.entry.name)
            else:
                scales = None if part.scales is None else stream.later(part.scales.name)
                made.put_codes(scales, source.later(), part.expert, part.row, name=part.entry.name)
        return made.tensors()

    def _landed_experts(self, name: str, parts: Sequence[ExpertPart], stream: TensorStream) -> dict[str, torch.Tensor]:
        """The same, where each part lands in its place."""
        made = stream.made_of_parts([part.entry.name for part in parts])
        scales = made.scales
        if made.marks is not None:
            self._quantizer.health.watch_marks(name, made.marks, parts=partial(_first_rows, parts))
        elif of_codes := [part.scales.name for part in parts if part.scales is not None]:
            scales = stream.made_of_parts(of_codes).tensor
            self._quantizer.health.watch_scales(name, scales.flatten(), partial(_first_rows, parts))
        return experts_tensors(name, made.tensor, scales)

    def experts_of(self, name: str, whole: torch.Tensor, destination: Destination) -> dict[str, torch.Tensor]:
        """The same of what a converter made of them: 16 or 32 bit, as the module itself would have it."""
        self._recorder.count_quantizer(OPERATOR)
        transposed = self._quantizer.is_stored_transposed(name)
        shape = tuple(whole.transpose(1, 2).shape if transposed else whole.shape)
        made = Experts(name, shape, destination.dtype, destination.device, self._quantizer.health)
        for expert, weight in enumerate(whole):
            made.put(TensorSource(weight), expert, 0, transposed=transposed)
        return made.tensors()

    def merged(self, name: str, sources: Sequence[Entry], stream: TensorStream) -> torch.Tensor:
        """The parameter whose parts the stream lets `sources` land in."""
        whole = stream.made_of_parts([entry.name for entry in sources])
        if whole.marks is not None:
            self._quantizer.health.watch_marks(name, whole.marks, partial(_find_overflow, sources))
        return whole.tensor

    def _becomes(self, name: str, entry: Entry, model_dtype: torch.dtype) -> ToInt8 | ToDtype:
        """What becomes of a weight of which an int8 one is made, now or in the forward pass, on its way."""
        if self._quantizer.reads_bands:
            return ToInt8(model_dtype, self._quantizer.is_stored_transposed(name))
        return ToDtype(entry.torch_dtype)

    def _scales(self, name: str, scales: Entry, stream: TensorStream) -> torch.Tensor:
        return stream.whole(scales.name) if self._quantizer.dequantizes(name) else stream.later(scales.name)

    def _takes_codes(self, name: str, stored: Stored) -> bool:
        return self._quantizer.takes_codes(name, stored.scales is not None)

    def _cast(self, name: str, entry: Entry, destination: Destination, stream: TensorStream) -> torch.Tensor:
        """The entry's values, contiguous; a cast may overflow."""
        device, dtype = destination.device, destination.dtype
        self._recorder.count("as stored" if entry.torch_dtype == dtype else "cast")
        find_overflow = partial(_find_overflow, [entry])
        if (made := stream.made(entry.name)) is not None:
            if made.marks is not None:
                self._quantizer.health.watch_marks(name, made.marks, find_overflow)
            return made.tensor
        if _is_cast_in_bands(entry, dtype):
            tensor = torch.empty(entry.torch_shape, dtype=dtype, device=device)
            for row, band in stream.bands(entry.name):
                tensor[row : row + len(band)].copy_(band)
        else:
            tensor = stream.whole(entry.name).to(device=device, dtype=dtype)
        self._quantizer.health.watch_cast(name, tensor, [entry.torch_dtype], find_overflow)
        return tensor


def _first_rows(parts: Sequence[ExpertPart]) -> list[tuple[int, str]]:
    """The first row of each part among those of all experts, and its name in the checkpoint, in order."""
    _, out, _ = _shape_of(parts)
    return sorted((part.expert * out + part.row, part.entry.name) for part in parts)


def _is_cast_in_bands(entry: Entry, dtype: torch.dtype) -> bool:
    """Whether a tensor that is cast to `dtype` should pass through scratch instead of landing whole."""
    return entry.torch_dtype != dtype and entry.nbytes > _BAND_WORTHY_BYTES and len(entry.torch_shape) > 0


def _find_overflow(entries: Sequence[Entry]) -> Iterator[BadWeight]:
    """The first value in each of the stored tensors that is finite, but too large for fp16."""
    floats = (entry for entry in entries if entry.is_floating)
    return (bad for entry in floats for bad in first_overflow(entry.name, read_tensor(entry)))
