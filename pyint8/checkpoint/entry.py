"""Where one tensor's bytes lie, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pyint8.errors import CheckpointError

from .stamp import FileStamp

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, tuple[int, str | None]] = MappingProxyType(
    {
        "BOOL": (8, "bool"),
        "F4": (4, "float4_e2m1fn_x2"),
        "F6_E2M3": (6, None),
        "F6_E3M2": (6, None),
        "U8": (8, "uint8"),
        "I8": (8, "int8"),
        "F8_E5M2": (8, "float8_e5m2"),
        "F8_E4M3": (8, "float8_e4m3fn"),
        "F8_E8M0": (8, "float8_e8m0fnu"),
        "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
        "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
        "I16": (16, "int16"),
        "U16": (16, "uint16"),
        "F16": (16, "float16"),
        "BF16": (16, "bfloat16"),
        "I32": (32, "int32"),
        "U32": (32, "uint32"),
        "F32": (32, "float32"),
        "C64": (64, "complex64"),
        "F64": (64, "float64"),
        "I64": (64, "int64"),
        "U64": (64, "uint64"),
    }
)
"""Every dtype of the safetensors format (as of safetensors 0.8): bits per element, and the attribute of `torch` that is
the same dtype, None where torch has none. torch's `float4_e2m1fn_x2` holds two of the format's elements."""

FLOATS = frozenset(dtype for dtype in DTYPES if dtype.startswith(("F", "BF")))
"""Those of real floating-point numbers (as torch says: complex ones are not)."""

SCALES = "SCB"
"""What bitsandbytes saves the scales of an int8 weight as, beside it: "X.SCB" for "X.weight"."""
FORMAT = "weight_format"
"""The same, of the layout of its codes."""

CODES: Mapping[str, str] = MappingProxyType(
    {attribute: code for code, (_, attribute) in DTYPES.items() if attribute is not None}
)
"""The format's name of each dtype, by the attribute of `torch`."""


# Not frozen, though nothing changes one: making it would take three times as long, and a mixture has 19,000.
@dataclass(slots=True, unsafe_hash=True)
class Entry:
    """One tensor of a checkpoint, not yet read.

    Attributes:
        name: The tensor's name in the checkpoint.
        dtype: The format's name of the dtype, a key of `DTYPES`, such as "BF16".
        shape: The format's shape, in elements; empty for a scalar.
        path: The file that holds the tensor.
        offset: Where its first byte lies, in bytes from the start of the file.
        nbytes: How many bytes it has there: little-endian, contiguous and row-major unless `stride` says otherwise.
        stride: Steps between elements, as torch has them, of a tensor that is not contiguous; `nbytes` then reaches
            from its first element to its last.
        stamp: The state of the file when its header was read; None if any state will do.
        crc32c: The CRC-32C of its bytes, if a file of checksums has it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int
    stride: tuple[int, ...] | None = None
    stamp: FileStamp | None = None
    crc32c: int | None = None

    @property
    def location(self) -> dict[str, Any]:
        """Where it lies, as errors take it: `raise ShapeMismatchError("...", **entry.location)`."""
        return {"tensor": self.name, "path": self.path, "offset": self.offset}

    @property
    def numel(self) -> int:
        """The number of elements, as the format counts them; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether the elements are of one of `FLOATS`."""
        return self.dtype in FLOATS

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the tensor; imports torch.

        Raises:
            CheckpointError: The installed torch has no such dtype.
        """
        import torch

        attribute = DTYPES[self.dtype][1]
        if attribute is None:
            raise self._error(f"torch has no dtype for {self.dtype}; convert the tensor to one it has, such as BF16")
        dtype = getattr(torch, attribute, None)
        if not isinstance(dtype, torch.dtype):
            raise self._error(
                f"torch {torch.__version__} has no torch.{attribute}, the dtype of {self.dtype}; install a newer torch"
            )
        return dtype

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in torch, which differs from `shape` for F4 only: torch packs two F4 in one element.

        Raises:
            CheckpointError: The last dimension of an F4 tensor is odd or absent, so torch cannot hold it.
        """
        if self.dtype != "F4":
            return self.shape
        if not self.shape or self.shape[-1] % 2:
            raise self._error(
                f"torch packs F4 in pairs, and the last dimension of shape {list(self.shape)} is not even; "
                "pad the tensor or convert it to another dtype"
            )
        return (*self.shape[:-1], self.shape[-1] // 2)

    def shaped(self, elements: torch.Tensor) -> torch.Tensor:
        """The tensor, contiguous, of its elements [n] as they lie in the file."""
        if self.stride is None:
            return elements.view(self.torch_shape)
        return elements.as_strided(self.torch_shape, self.stride).contiguous()

    def element(self, index: int) -> Entry:
        """The index-th of a stack of tensors: element `index` of the first dimension, as an entry of its own.

        Raises:
            CheckpointError: It is not contiguous.
        """
        if self.stride is not None:
            raise self._error("a stack of weights that is not contiguous; save the checkpoint again")
        nbytes = self.nbytes // self.shape[0]
        name, offset = f"{self.name}[{index}]", self.offset + index * nbytes
        return Entry(name, self.dtype, self.shape[1:], self.path, offset, nbytes, None, self.stamp)

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(problem, path=self.path, tensor=self.name, offset=self.offset)


@dataclass(slots=True, unsafe_hash=True)
class EntryInMemory(Entry):
    """One tensor of a file that cannot be read by offset, and was read whole.

    Attributes:
        value: The tensor, contiguous, in host memory; `offset` says nothing.
    """

    value: torch.Tensor = field(kw_only=True, compare=False, repr=False)
