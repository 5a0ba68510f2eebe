"""Forward passes of any model: inputs made from its configuration and the names of its arguments, outputs compared."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers as tf

Inputs = dict[str, Any]
Call = Callable[..., Any]

# How long inputs are looked for.
_SECONDS = 2
_TOKENS = 12
_MOST_VALUES = 1_000_000
_INNER = ("vision_config", "audio_config", "encoder_config", "backbone_config", "encoder", "vision_backbone_config")


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _whole(shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


def _field(config: Any, *names: str, default: Any) -> Any:
    """A field of a configuration, or of one within it."""
    inner = [getattr(config, name, None) for name in _INNER]
    found = (getattr(one, name, None) for one in (config, *inner) for name in names)
    return next((value for value in found if value is not None), default)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        size = (size.get("height", 64), size.get("width", 64))
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _channels(config: Any) -> int:
    channels = _field(config, "num_channels", "in_channels", "in_chans", default=3)
    return channels if isinstance(channels, int) else 3


def _ids(config: Any) -> Iterator[torch.Tensor]:
    size = getattr(config.get_text_config(), "vocab_size", None) or 100
    for count in (_TOKENS, 64):
        yield _whole((1, count), 5, max(6, min(size, 100)))


def _images(config: Any) -> Iterator[torch.Tensor]:
    channels, size = _channels(config), _pair(_field(config, "image_size", "input_size", "crop_size", default=64))
    sizes = dict.fromkeys([size, (64, 64), (128, 128), (224, 224)])
    for shape in (
        *((1, channels, *one) for one in sizes),
        (1, _field(config, "num_frames", "frames_per_clip", default=2), channels, *size),
        (1, 2, channels, *size),
    ):
        if math.prod(shape) <= _MOST_VALUES:
            yield _drawn(*shape)


def _patches(config: Any) -> Iterator[torch.Tensor]:
    """Of an image of 4 x 4, or two frames of such."""
    channels, (height, width) = _channels(config), _pair(_field(config, "patch_size", default=8))
    for deep in dict.fromkeys([_field(config, "temporal_patch_size", default=1), 1, 2]):
        yield _drawn(16, deep * channels * height * width)
        yield _drawn(1, 16, deep * channels * height * width)
    yield _drawn(16, channels, height, width)


def _sounds(config: Any) -> Iterator[torch.Tensor]:
    bins = _field(config, "num_mel_bins", "n_mels", "input_feat_size", "input_dim", "feature_size", default=80)
    length = _field(config, "max_length", "max_source_positions", default=64)
    for frames in dict.fromkeys([2 * length, length, 64, 128]):
        yield _drawn(1, bins, frames)
        yield _drawn(1, frames, bins)


def _waves(config: Any) -> Iterator[torch.Tensor]:
    yield from (_drawn(1, 3200), _drawn(1, 1, 3200), _drawn(1, 1, 9600))
    yield _drawn(1, _field(config, "max_length", default=64), _field(config, "num_mel_bins", default=80))


def _series(config: Any) -> Iterator[torch.Tensor]:
    length = min(_field(config, "context_length", default=32), 512)
    yield _drawn(1, length, _field(config, "num_input_channels", "input_size", default=1))
    yield _drawn(1, length)


def _boxes(config: Any) -> Iterator[torch.Tensor]:
    yield _whole((1, _TOKENS, 4), 0, 60).sort(-1).values
    yield _whole((1, _TOKENS, 8), 0, 2).float()


def _visual(config: Any) -> Iterator[torch.Tensor]:
    yield _drawn(1, 4, _field(config, "visual_feat_dim", "visual_embedding_dim", default=32))


def _always(*values: Any) -> Callable[[Any], Iterator[Any]]:
    return lambda config: iter(values)


# What an argument may be, in the order in which it is tried.
_MAKERS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "qformer_input_ids": _ids,
    "bbox": _boxes,
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "hidden_states": _patches,
    "grid_thw": _always(torch.tensor([[1, 4, 4]])),
    "image_grid_thw": _always(torch.tensor([[1, 4, 4]])),
    "merge_sizes": _always(torch.tensor([1])),
    "spatial_shapes": _always(torch.tensor([[4, 4]])),
    "target_sizes": _always(torch.tensor([[4, 4]])),
    "pixel_attention_mask": _always(torch.ones(1, 16, dtype=torch.long)),
    "image_sizes": lambda config: iter([torch.tensor([_pair(_field(config, "image_size", default=64))])]),
    "input_features": _sounds,
    "audio_mel": _sounds,
    "input_values": _waves,
    "past_values": _series,
    "freq": _always(torch.zeros(1, 1, dtype=torch.long)),
    "visual_feats": _visual,
    "visual_embeds": _visual,
    "visual_pos": _always(_drawn(1, 4, 4)),
    "query_embeds": lambda config: iter([_drawn(1, 4, config.hidden_size)]),
    "noise_embeds": lambda config: iter([_drawn(1, 4, config.hidden_size)]),
}
# Masks that are wanted, by what they are of: all of it is there.
_MASKS = {"input_features_mask": "input_features", "audio_mel_mask": "audio_mel", "past_values_padding": "past_values"}
_OF_IMAGES = ("pixel_values", "pixel_values_videos", "hidden_states", "image_sizes", "pixel_attention_mask")
_OF_GRIDS = ("grid_thw", "image_grid_thw", "merge_sizes", "spatial_shapes", "target_sizes")


def calls(model: tf.PreTrainedModel) -> list[Call]:
    """What of a model is run: it, and what looks at images, sounds and texts for it."""
    features = [getattr(model, f"get_{kind}_features", None) for kind in ("image", "audio", "text")]
    return [call for call in (model.forward, *features) if call is not None]


def attempts(call: Call, config: Any) -> Iterator[Inputs]:
    """Inputs that a call may take, the fullest first."""
    parameters = inspect.signature(call).parameters
    fixed = {"use_cache": False} if "use_cache" in parameters else {}
    known = [name for name in _MAKERS if name in parameters]
    in_patches = any(name in known for name in _OF_GRIDS)
    makers = _MAKERS | ({"pixel_values": _patches} if in_patches else {})
    required = {name for name, one in parameters.items() if one.default is one.empty and one.kind < one.VAR_POSITIONAL}
    for left_out in (
        ("pixel_values_videos",),
        (*_OF_IMAGES, *_OF_GRIDS, "input_features"),
        ("input_ids", "decoder_input_ids"),
    ):
        names = [name for name in known if name not in left_out or name in required]
        for values in itertools.islice(itertools.product(*(makers[name](config) for name in names)), 40):
            yield _with_masks(dict(zip(names, values, strict=True)), parameters) | fixed


def _with_masks(inputs: Inputs, parameters: Mapping[str, Any]) -> Inputs:
    wanted = {mask: inputs[of] for mask, of in _MASKS.items() if mask in parameters and of in inputs}
    return inputs | {mask: torch.ones(1, of.shape[-1], dtype=torch.long) for mask, of in wanted.items()}


def first_that_runs(call: Call, model: tf.PreTrainedModel) -> tuple[Inputs, torch.Tensor] | None:
    """Inputs on which a call gives finite numbers, and the numbers; None if none is found."""
    deadline = time.monotonic() + _SECONDS
    for inputs in attempts(call, model.config):
        try:
            output = run(call, inputs, model.dtype)
        except Exception:  # whatever a model says of inputs that are not for it
            output = None
        if output is not None and output.numel() and bool(output.isfinite().all()):
            return inputs, output
        if time.monotonic() > deadline:
            break
    return None


def run(call: Call, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor | None:
    """The first floating tensor of the output, flat and in float32."""
    torch.manual_seed(0)  # some draw noise
    with torch.no_grad():
        output = call(**{name: _cast(value, dtype) for name, value in inputs.items()})
    found = next((tensor for tensor in _tensors(output) if tensor.is_floating_point()), None)
    return None if found is None else found.float().flatten()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from itertools.chain.from_iterable(map(_tensors, output.values()))
    elif isinstance(output, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_tensors, output))
