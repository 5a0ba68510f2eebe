"""Hugging Face checkpoints to bitsandbytes int8 models, at the speed of the bus.

    import pyint8
    model = pyint8.load("path/to/checkpoint", device_map="auto")

Importing pyint8 imports neither torch nor transformers nor bitsandbytes; loading does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pyint8.config import Int8Config, StreamOptions, set_registration
from pyint8.errors import Pyint8Error, RankError
from pyint8.host.imports import importing
from pyint8.models.transformers.releases import require_transformers
from pyint8.operations.convert import convert
from pyint8.operations.inspect import Inspection, inspect
from pyint8.operations.load import load
from pyint8.operations.reload import reload
from pyint8.operations.save import save
from pyint8.operations.verify import Verification, verify
from pyint8.report import LoadReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Inspection",
    "Int8Config",
    "LoadReport",
    "Pyint8Error",
    "RankError",
    "StreamOptions",
    "Verification",
    "convert",
    "inspect",
    "load",
    "reload",
    "save",
    "takeover",
    "verify",
]
__version__ = "0.1.0"


def _register_quantizer() -> None:
    """For `from_pretrained(..., quantization_config=Int8Config())`."""
    require_transformers()
    with importing:
        import pyint8.models.transformers.hooks  # noqa: F401


set_registration(_register_quantizer)


def takeover(*, process_group: ProcessGroup | None = None) -> AbstractContextManager[list[LoadReport]]:
    """While it lasts, every int8 load by transformers in this process goes through pyint8.

        with pyint8.takeover() as loads:
            ...
        print(loads[0])  # the LoadReport of the first load that ended meanwhile

    For programs whose calls cannot be changed: `from_pretrained(..., quantization_config=BitsAndBytesConfig(
    load_in_8bit=True))`, and checkpoints that are int8 already. (transformers 5 has no `load_in_8bit` argument of
    from_pretrained any more; where its error leaves the block, it is an OptionError that says so.) The models are the
    same, byte for byte, and keep nothing of pyint8; bad values are warned of, not refused (`strict=False`); tensors
    that are in memory (`state_dict=`) are left to transformers; `PYINT8_*` environment variables are the options. The
    block changes transformers' registry of quantizers, until it ends (or the last of several that overlap): for all
    threads, but not for processes that this one starts. `python -m pyint8.run` runs a whole program like this.

    With a `process_group` its ranks load together, as in `pyint8.load`, each of the models that this thread loads: all
    ranks come to the block alike and leave it together, and what ends it on one ends it on all.
    """
    require_transformers()
    with importing:
        from pyint8.models.transformers.takeover import takeover
    return takeover(process_group)
