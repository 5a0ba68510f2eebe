"""What a stream is asked for: entries of checkpoints, and what shall become of them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from pyint8.checkpoint import EntryInMemory

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry

# Requests and what they are made of are named tuples: there are thousands, and dataclasses that are frozen take four
# times as long to make (docs/performance.md, "Many small tensors").

# What the extension's kernels read and write, by the names of the safetensors format.
KERNEL_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
KERNEL_NAMES = {dtype: name for name, dtype in KERNEL_DTYPES.items()}


def is_plain(entry: Entry) -> bool:
    """Whether its values are bytes of a file, one behind the other, so that they can land without Python."""
    return entry.nbytes > 0 and entry.stride is None and not isinstance(entry, EntryInMemory)


def kernels_cast(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether values become `dtype` on their way to a GPU: they are that already, or a kernel casts them."""
    return stored == dtype or {stored, dtype} <= set(KERNEL_DTYPES.values())


class ToInt8(NamedTuple):
    """Codes and scales, in bitsandbytes' row-wise form.

    Attributes:
        model_dtype: Rounded to before fp16, as transformers casts before it quantizes.
        transposed: Stored as [in, out], a Conv1D's weight: transpose it first.
    """

    model_dtype: torch.dtype
    transposed: bool = False


class ToDtype(NamedTuple):
    """The values, cast to `dtype` if they are not stored as that."""

    dtype: torch.dtype


class Part(NamedTuple):
    """A contiguous part of a tensor that several entries make.

    Attributes:
        name: The tensor's, for all of its parts.
        shape: The tensor's.
        offset: In elements, from its start.
    """

    name: str
    shape: tuple[int, ...]
    offset: int


class TensorRequest(NamedTuple):
    """One entry's way.

    Attributes:
        entry: What to read.
        device: Where the result is wanted. It lands there if that is a CUDA device or the CPU, else on the CPU.
        in_bands: Land in scratch, a band of rows at a time, instead of in a tensor of its own.
        batch: Land in one piece of memory with those before and after that have the same `batch`, dtype and shape;
            to be had by `TensorStream.batched` alone, and not in bands.
        becomes: What `TensorStream.made` gives where the GPU's consumer can make it; elsewhere of no meaning.
        part: Where the values go that `becomes` asks for, if not to a tensor of their own; `TensorStream.made` gives
            the whole tensor. Its parts are all requested of one device, and stored and wanted in one dtype each.
    """

    entry: Entry
    device: torch.device
    in_bands: bool = False
    batch: str | None = None
    becomes: ToInt8 | ToDtype | None = None
    part: Part | None = None

    @property
    def is_transposed(self) -> bool:
        """Whether it becomes int8, and is stored as [in, out]."""
        return isinstance(self.becomes, ToInt8) and self.becomes.transposed

    @property
    def out_rows(self) -> int:
        """Rows of what becomes int8."""
        return self.entry.torch_shape[1 if self.is_transposed else 0]

    @property
    def marks(self) -> int:
        """How many marks (see `pyint8.streaming.made.Made`) there are of the result, or of all that it is a part of."""
        if isinstance(self.becomes, ToInt8):
            return self.out_rows if self.part is None else prod(self.part.shape[:-1])
        casts_to_half = self.becomes is not None and self.becomes.dtype == torch.float16
        return 1 if casts_to_half and self.entry.torch_dtype != torch.float16 else 0

    @property
    def allocated_bytes(self) -> int:
        """What memory is taken for at once: all of the larger tensor that the result is a part of, if it is one."""
        if self.part is None:
            return self.final_bytes
        rows = prod(self.part.shape[:-1]) if isinstance(self.becomes, ToInt8) else 0
        dtype = self.becomes.dtype if isinstance(self.becomes, ToDtype) else torch.int8
        return prod(self.part.shape) * dtype.itemsize + rows * torch.float32.itemsize

    @property
    def final_bytes(self) -> int:
        """What the result takes."""
        if isinstance(self.becomes, ToInt8):
            return self.entry.numel + self.out_rows * torch.float32.itemsize
        return self.entry.nbytes if self.becomes is None else self.entry.numel * self.becomes.dtype.itemsize
