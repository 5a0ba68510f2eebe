"""From an int8 model to a checkpoint: `pyint8.save`."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint import checkpoint_of_files
from pyint8.checkpoint.card import hub_id_of, model_card
from pyint8.checkpoint.find import cached_file, find_checkpoint
from pyint8.checkpoint.replacement import replaced_folder
from pyint8.checkpoint.side_files import carry_side_files, is_of_a_save
from pyint8.errors import CheckpointError, OptionError
from pyint8.host.files import exists, is_folder
from pyint8.host.imports import importing
from pyint8.host.writing import write_errors
from pyint8.models.origin import Origin, origin, origin_of, reloaded_from
from pyint8.operations.common import decoded_folder, is_of_transformers
from pyint8.operations.push import push_folder, require_repository

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    checksums: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    fused_experts: bool = False,
) -> None:
    """Save an int8 model as bitsandbytes' standard int8 checkpoint, which transformers, accelerate and pyint8 load.

    For a transformers model, pyint8's or transformers' own: the weights as `save_pretrained` writes them, the
    configurations, and, if they are still there, the tokenizer and whatever else lies beside the weights it was loaded
    from (of a hub id what was downloaded, by `AutoTokenizer` for instance; a warning says if nothing was); and a model
    card, unless there is one in `folder`. For any other module the weights alone;
    `pyint8.load(folder, model=module)` loads them.

    The new files are made in a folder beside, and take the name of `folder` all at once, when they are on the disk. An
    interrupted save leaves what was there. Other files in `folder` stay. A tensor passes through host memory in pieces.

    Args:
        model: Any model with int8 modules (bitsandbytes' `Linear8bitLt`).
        folder: Where to; made if it is not there.
        max_shard_size: Of one file, in bytes or as a size such as "5GB"; a tensor that is larger has its own.
        checksums: Also write `model.safetensors.crc32c.json`, with the CRC-32C of each tensor: loads then compare what
            they read, and `verify` does.
        push_to_hub: The repository that `folder` is uploaded to afterwards, "me/Llama-3.1-8B-int8"; made before, if it
            is not there.
        private: Whether that repository, if it is made, is private.
        fused_experts: Write the int8 experts of a module as one tensor, codes [experts, out, in] and scales
            [experts, out], which is read back many times faster. Otherwise each expert has tensors of its own, as
            transformers 4 wrote them, where the model's checkpoints have them so.

    Raises:
        ModelNotSupportedError: The model is not int8, or has adapters.
        OptionError: An argument that cannot be used; or `folder` is the one that the model was loaded from, whose
            weights are not int8, and would be lost.
        ReadError: Whether they are cannot be read.
        WriteError: The operating system refused, as when the disk is full; or the hub did, and `folder` is complete.
    """
    module, path = _checked(model), decoded_folder(folder)
    _refuse_source(module, path)
    if private and push_to_hub is None:
        raise OptionError("private is for push_to_hub, which makes a repository, and was not given")
    if push_to_hub is not None:
        require_repository(push_to_hub, private=private)
    if fused_experts and not is_of_transformers(module):
        raise OptionError("fused_experts is for transformers models, whose experts are of known classes; leave it out")
    _save(module, path, max_shard_size, checksums=checksums, fused_experts=fused_experts)
    if push_to_hub is not None:
        logger.info("pushed to %s", push_folder(path, push_to_hub))


def _save(module: nn.Module, path: str, max_shard_size: int | str, *, checksums: bool, fused_experts: bool) -> None:
    with replaced_folder(path, is_of_a_save) as staging, write_errors(path):
        if is_of_transformers(module):
            with importing:
                from pyint8.models.transformers.saving import save_model

            save_model(module, staging, max_shard_size, checksums=checksums, fused_experts=fused_experts)
            describe(module, staging, has_card=exists(os.path.join(path, "README.md")))
        else:
            with importing:
                from pyint8.models.saving import save_module

            save_module(module, staging, max_shard_size, checksums=checksums)


def _refuse_source(module: nn.Module, path: str) -> None:
    """Of weights that are int8 already, a save puts the same kind in their place."""
    if not exists(path):
        return  # nothing lies there, so no header need be looked at
    for known in (origin_of(module) or _origin_by_name(module), reloaded_from(module)):
        files = [] if known is None or not known.lost_in(path) else list(filter(exists, known.files))
        if files and not _are_int8(files):
            raise OptionError(
                f"folder is the one that the model was loaded from, {path}, whose weights, which are not int8, would "
                "be lost; give another folder"
            )


def _origin_by_name(module: nn.Module) -> Origin | None:
    name = getattr(module, "name_or_path", None)
    if not is_of_transformers(module) or not isinstance(name, str) or not is_folder(name):
        return None
    try:
        found = find_checkpoint(name, {})
    except CheckpointError:
        return None
    return None if found is None else origin(module, found.files, name)


def _are_int8(files: list[str]) -> bool:
    try:
        return checkpoint_of_files(files).has_codes
    except CheckpointError:  # nothing can be made of them any more
        return True


def describe(model: Any, folder: str, *, has_card: bool) -> None:
    """Adds what lies beside the weights that a transformers model was loaded from, and a card."""
    name, source = str(model.name_or_path), _source_of(model)
    carried = [] if source is None else carry_side_files(source, folder)
    if name and not carried and (source is None or hub_id_of(name) is not None):
        logger.warning(
            "no tokenizer is saved with the model: nothing lies beside the weights of %s, or they are not here; save "
            "it with tokenizer.save_pretrained(folder)",
            name,
        )
    if not has_card:
        card = model_card(hub_id_of(name), _with_card(source, model), type(model).__name__)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)


def _source_of(model: Any) -> str | None:
    """The folder a model was loaded from; None if that is not known, or not there any more."""
    known = origin_of(model)
    return known.folder if known is not None and is_folder(known.folder) else _source_by_name(model)


def _source_by_name(model: Any) -> str | None:
    """The folder of a model's name, or of a hub id that in the local cache; None if it is not there."""
    name = model.name_or_path
    if is_folder(name):
        return str(name)
    try:
        config = cached_file(name, "config.json", {})
    except ValueError:  # no hub id
        return None
    return None if config is None else os.path.dirname(config)


def _with_card(source: str | None, model: Any) -> str | None:
    """The folder that has the source's card: of a folder inside of a repository it may be the repository's."""
    has_own = source is not None and exists(os.path.join(source, "README.md"))
    return source if has_own else _source_by_name(model) or source


def _checked(model: Any) -> nn.Module:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {model!r:.80}; it must be an int8 model")
    with importing:
        from pyint8.models.live import unwrapped

    inside: nn.Module = unwrapped(model)
    if hasattr(inside, "peft_config") and not is_of_transformers(inside):
        raise OptionError(
            "model is a PEFT model: save its adapter with model.save_pretrained(folder), or its base model with "
            "pyint8.save(model.unload(), folder)"
        )
    return inside
