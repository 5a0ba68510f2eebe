"""The model card of an int8 checkpoint: what the hub shows, and finds it by."""

from __future__ import annotations

import os
import re
from typing import Any

from pyint8.host.files import exists

_CACHED = re.compile(r"models--(?P<id>.+)")
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "tags")
_TAGS = ("int8", "8-bit", "bitsandbytes", "pyint8")
_TEXT = """
# {title}

{of_what} quantized to 8 bit with [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes) (LLM.int8()):
linear layers as int8 with a scale for each row, everything else as it was. transformers loads it as any other model:

```python
from transformers import {loader}

model = {loader}.from_pretrained(path, device_map="auto")
```
"""


def hub_id_of(path: str) -> str | None:
    """The hub id that a model was loaded from: `path` itself, or that of its folder in the cache; None for others."""
    if not exists(path):
        return path if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else None
    found = (_CACHED.fullmatch(part) for part in os.path.abspath(path).split(os.sep))
    return next((match["id"].replace("--", "/") for match in found if match), None)


def model_card(base: str | None, source: str | None, loader: str) -> str:
    """The text of a README.md.

    Args:
        base: The hub id of the model that was quantized, if it is known.
        source: Its folder, if there is one; its own card's licence, language, task and tags are kept.
        loader: The class of transformers to load it with.
    """
    from huggingface_hub import ModelCardData

    known = _metadata(source)
    kept = {name: known[name] for name in _KEPT if known.get(name)}
    tags = [*(kept.pop("tags", None) or []), *_TAGS]
    base = base or known.get("base_model")
    if base is not None:
        kept |= {"base_model": base, "base_model_relation": "quantized"}
    data = ModelCardData(library_name="transformers", tags=list(dict.fromkeys(tags)), **kept)
    title = f"{base.rpartition('/')[2]} in int8" if isinstance(base, str) else "A model in int8"
    of_what = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else "A model"
    return f"---\n{data.to_yaml()}\n---\n{_TEXT.format(title=title, of_what=of_what, loader=loader)}"


def _metadata(source: str | None) -> dict[str, Any]:
    """The data at the head of a folder's own card; empty if it has none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return dict(metadata_load(os.path.join(source or "", "README.md")) or {}) if source else {}
    except Exception:  # not ours to judge: no file, no YAML, no UTF-8
        return {}
