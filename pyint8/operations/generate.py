"""First tokens of a loaded model, to see that it speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyint8.errors import ModelNotSupportedError, OptionError
from pyint8.host.imports import importing
from pyint8.operations.common import located


def generate(
    model: Any,
    path: str,
    text: str,
    tokens: int,
    storage_options: Mapping[str, Any] | None = None,
    **hub_arguments: Any,
) -> str:
    """Go on with a text, by the likeliest tokens.

    Args:
        model: A transformers model that generates text.
        path: The folder, hub id or URL of its tokenizer.
        text: The beginning.
        tokens: The most to add.
        storage_options: For a URL.
        hub_arguments: For the tokenizer's from_pretrained.

    Returns:
        The text with what was added.

    Raises:
        OptionError: `tokens` is below 1.
        ModelNotSupportedError: It generates no text, or has no tokenizer.
    """
    if tokens < 1:
        raise OptionError(f"tokens is {tokens}; it must be at least 1")
    if not model.can_generate():
        raise ModelNotSupportedError(f"{type(model).__name__} generates no text")
    with located(path, hub_arguments, storage_options) as here:
        tokenizer = _tokenizer(here, hub_arguments)
    given = tokenizer(text, return_tensors="pt").to(model.device)
    made = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def _tokenizer(path: str, hub_arguments: dict[str, Any]) -> Any:
    with importing:
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(path, **hub_arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelNotSupportedError(f"the tokenizer in {path} cannot be loaded: {reason}") from error
