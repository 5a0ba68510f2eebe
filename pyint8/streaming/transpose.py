"""Transposing Conv1D weights: with the extension's kernel where there is one, else with torch's own operators."""

from __future__ import annotations

import logging

import torch

from pyint8.errors import DeviceError
from pyint8.streaming.extension import _core
from pyint8.streaming.lane import Lane
from pyint8.streaming.requests import KERNEL_DTYPES

logger = logging.getLogger(__name__)


class Transposer:
    """Transposes bands of a weight [in, out] into columns of an fp16 tensor [out, in], on one engine's lanes."""

    def __init__(self, engine: _core.Engine) -> None:
        self._engine = engine
        self._kernels = True

    def transpose(
        self, lane: Lane, band: torch.Tensor, dtype: str, model_dtype: torch.dtype, out: torch.Tensor
    ) -> None:
        """Writes `band` [rows, out], stored as `dtype`, to `out` [out, rows], columns of an fp16 tensor.

        Values are rounded to `model_dtype`, then to fp16, as transformers and bitsandbytes round them.
        """
        if not self._transpose_with_kernel(lane, band, dtype, model_dtype, out):
            out[:] = band.to(model_dtype).to(torch.float16).T

    def _transpose_with_kernel(
        self, lane: Lane, band: torch.Tensor, dtype: str, model_dtype: torch.dtype, out: torch.Tensor
    ) -> bool:
        if not self._kernels or dtype not in KERNEL_DTYPES or model_dtype not in KERNEL_DTYPES.values():
            return False
        rows, columns = band.shape
        try:
            self._engine.transpose_to_half(
                lane.index,
                band.data_ptr(),
                dtype,
                model_dtype == torch.bfloat16,
                rows,
                columns,
                out.data_ptr(),
                out.stride(0),
                lane.stream,
            )
        except DeviceError as error:
            logger.warning("Conv1D weights are transposed by torch, more slowly: %s", error)
            self._kernels = False
            return False
        return True
