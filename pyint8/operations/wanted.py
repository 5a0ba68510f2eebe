"""Which int8 form in the cache a load wants: all that makes it another one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pyint8.checkpoint import Checkpoint
from pyint8.checkpoint.find import FILE_ARGUMENTS, configuration, configuration_file
from pyint8.checkpoint.identity import descriptions, digest, has_digest, identity_of, versions
from pyint8.config import Int8Config, StreamOptions
from pyint8.remote.objects import tag_of

# What changes which tensor is which, in a way that the int8 form has behind it.
_UNFIT = ("key_mapping", "state_dict", "gguf_file", "ignore_mismatched_sizes", "num_labels", "id2label")


@dataclass(frozen=True)
class Wanted:
    """What decides which int8 form is the right one: the arguments of a load.

    Attributes:
        source: The folder or hub id of the model.
        device_map: Where modules go.
        dtype: Of what is not quantized, and on the way to int8.
        config: What to quantize.
        model_class: A transformers class, or None for the one that the configuration names.
        arguments: Of `from_pretrained`.
        options: How to move bytes.
        storage_options: For a source that is a URL.
    """

    source: str
    device_map: Any
    dtype: Any
    config: Int8Config | None
    model_class: Any
    arguments: Mapping[str, Any]
    options: StreamOptions
    storage_options: Mapping[str, Any] | None = None

    def key(self, checkpoint: Checkpoint, path: str) -> str:
        """Its name in the cache: another one for whatever makes it another.

        Args:
            checkpoint: The source.
            path: What it was found by: a hub id, or the folder, which for a URL stands for that.

        Raises:
            ReadError: What describes it cannot be read.
        """
        from pyint8.models.request import check_dtype

        config = self.config or Int8Config()
        described = [
            identity_of(checkpoint, tag_of),
            [descriptions(folder) for folder in self._folders(checkpoint, path)],
            self._changing,
            self.device,
            str(check_dtype(self.dtype)),
            {name: value for name, value in asdict(config).items() if name != "strict"},
            None if self.model_class is None else f"{self.model_class.__module__}.{self.model_class.__qualname__}",
            versions(),
        ]
        name = os.path.basename(os.path.normpath(self.source)) or "model"
        return f"{name}-{digest(described)[:16]}"

    @property
    def _changing(self) -> dict[str, Any]:
        """The arguments that may change the model, or its configuration, which the int8 form has as the first load had
        it. What those about files find is in its name."""
        return {name: value for name, value in self.arguments.items() if name not in FILE_ARGUMENTS}

    def home(self, checkpoint: Checkpoint, path: str) -> str:
        """The folder of the source's configuration, which may name weights in a folder inside of it."""
        return os.path.dirname(configuration_file(path, self.arguments) or checkpoint.files[0])

    def _folders(self, checkpoint: Checkpoint, path: str) -> Iterable[str]:
        """Those with what describes the source; code lies in the folder around a subfolder."""
        home = self.home(checkpoint, path)
        inside = os.path.normpath(self.arguments.get("subfolder") or "")
        return dict.fromkeys([home, home.removesuffix(os.sep + inside)])

    @cached_property
    def device(self) -> str | None:
        """Where weights are quantized: "cuda", "cpu", or None for a mixture, or another kind."""
        import torch

        from pyint8.placement.device_map import check_device_map, is_planned

        check_device_map(self.device_map)
        if self.device_map is None or is_planned(self.device_map):
            return "cuda" if torch.cuda.is_available() else "cpu"
        devices = self.device_map.values() if isinstance(self.device_map, Mapping) else [self.device_map]
        kinds = {"disk" if each == "disk" else torch.device(each).type for each in devices}
        kind = kinds.pop() if len(kinds) == 1 else None
        return kind if kind in ("cuda", "cpu") else None

    def why_not(self, checkpoint: Checkpoint | None, path: str) -> str | None:
        """What keeps it from the cache, if anything does."""
        unfit = [name for name in _UNFIT if self.arguments.get(name)]
        if unfit:
            return f"{unfit[0]} makes another model of the checkpoint"
        opaque = [name for name, value in self._changing.items() if not has_digest(value)]
        if opaque:
            return f"{opaque[0]} is an object, and only plain values can be told from others"
        if self.config is not None and self.config.has_fp16_weight:
            return "has_fp16_weight keeps weights in 16 bit"
        if self.device is None or (self.config is not None and self.config.fp32_cpu_offload):
            return "the model is spread over several kinds of devices"
        if checkpoint is not None and checkpoint.has_codes:
            return "the checkpoint is int8 already"
        if self.arguments.get("trust_remote_code") and self._has_code_elsewhere(path):
            return "its code lies in another repository, and may be another at the next load"
        return None

    def _has_code_elsewhere(self, path: str) -> bool:
        """Whether the configuration names code in another repository: "owner/name--module.Class"."""
        found = configuration(path, self.arguments)
        return found is not None and "--" in json.dumps(found[1].get("auto_map"))
