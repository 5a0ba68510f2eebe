"""Which tensors a load can begin with, when only the checkpoint and the device map are known."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pyint8.checkpoint import DTYPES, FLOATS
from pyint8.host.processes import processes
from pyint8.placement.device_map import current_gpu, is_planned
from pyint8.placement.even import even_needs, even_parts
from pyint8.streaming.guesses import EXPERTS, Guess, guess_requests, guessable
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.natural_order import natural_key

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint, Entry
    from pyint8.config import StreamOptions
    from pyint8.streaming.ranks.ranks import Ranks

# The part of the model's own memory that the first tensors may take: as much as arrives while a model of 8 billion
# parameters is built. The model uses all of it later; the rest is for the weight being quantized.
_EARLY_PART = 0.95
# The part of a GPU's free memory that a planned map uses at least (transformers' 0.9, times 0.9 for quantizing).
_PLANNED_PART = 0.8
# Maps that give every GPU about as much.
_EVEN_MAPS = frozenset({"auto", "balanced"})
# How much of a GPU's part of the model's memory its first tensors may take, of several.
_SPREAD_PART = 0.8
# A GPU that gets no more layers begins with all of them, not away from the borders.
_FEW_LAYERS = 3
_BITS = {dtype: DTYPES[dtype][0] for dtype in FLOATS}  # of one number


def open_head_start(
    device_map: Any, options: StreamOptions, ranks: Ranks | None = None, *, is_bounded: bool
) -> HeadStart | None:
    """A head start for a load with this device map; None if no GPU will be used, or if it is not known which.

    `ranks` load onto one GPU each. `is_bounded`: GPUs may use only a part of their memory.
    """
    found = first_gpu(device_map)
    if found is None:
        return None
    gpu, takes_all = found
    gpus = 1 if takes_all else torch.cuda.device_count()
    spreads = not takes_all and _spreads_evenly(device_map, is_bounded=is_bounded)
    devices = [torch.device("cuda", index) for index in range(gpus)] if spreads else [gpu]
    return HeadStart(devices, options, gpus=gpus, ranks=ranks)


def first_tensors(
    checkpoint: Checkpoint, device_map: Any, *, is_bounded: bool, guess: Guess | None = None
) -> list[FirstTensors]:
    """What the devices of a head start begin with.

    Tensors are read only if all of them go to one GPU, or a map will be planned ("auto") that spreads them evenly over
    all there are; of several GPUs, each begins with what it is likely to get, and what another one gets is read again.
    A planned map depends on the memory that is free: GPUs must be so large that it will be the same with what landed
    before.

    Args:
        checkpoint: What is to be loaded.
        device_map: Where to.
        is_bounded: Whether GPUs may use only a part of their memory.
        guess: What weights become; experts then land in their place.
    """
    found = first_gpu(device_map)
    if found is None:
        return []
    gpu, takes_all = found
    if not takes_all and not _spreads_evenly(device_map, is_bounded=is_bounded):
        return []
    entries = list(checkpoint.values())
    if takes_all:
        return [_of_one(entries, gpu, guess, lambda _: 0)]
    sizes = list(map(_least_bytes, entries))
    is_16_bit = guess is not None and guess.is_16_bit
    most = max(checkpoint.nbytes, 2 * sum(sizes)) if is_16_bit else checkpoint.most_bytes_loaded
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return [_of_one(entries, gpu, guess, partial(_planned_if_free, most))]
    return _spread(entries, gpus, guess, _planned_if_free(most, _most_early(sizes, sum(sizes))) // gpus)


def _planned_if_free(most: int, early: int) -> int:
    """What must be free for a planned map to be the same, if a model takes `most` and so many bytes are early."""
    return int((most + early) / _PLANNED_PART)


def _of_one(
    entries: Sequence[Entry], gpu: torch.device, guess: Guess | None, if_free: Callable[[int], int]
) -> FirstTensors:
    """What one GPU begins with that gets all."""
    experts = guessable(entries) if guess else []
    # To sort thousands of experts takes a while.
    others = _in_order(entry for entry in entries if not experts or EXPERTS not in entry.name)
    part = _part(_Held(gpu, entries, others, experts), guess, 1.0, if_free)
    otherwise = partial(_of_one, entries, gpu, None, if_free)
    return replace(part, otherwise=otherwise if part.guess else None)


class _Held(NamedTuple):
    """What a GPU gets.

    Attributes:
        gpu: The GPU.
        entries: All of it.
        begun: What it may begin with.
        experts: Of this, those whose place can be guessed.
    """

    gpu: torch.device
    entries: Sequence[Entry]
    begun: Sequence[Entry]
    experts: Sequence[Entry]


def _part(held: _Held, guess: Guess | None, room: float, if_free: Callable[[int], int]) -> FirstTensors:
    """What a GPU begins with: what is no expert, and then experts in their place; without a guess, any.

    Args:
        held: What it gets.
        guess: What experts become.
        room: The part of the model's memory that others may take.
        if_free: How much memory must be free for so many bytes that are early.
    """
    gpu, entries, begun, experts = held
    if guess is None or not experts:
        return _unguessed(gpu, entries, begun, room, if_free)
    others, begun_others = ([entry for entry in each if EXPERTS not in entry.name] for each in (entries, begun))
    nbytes = guess.nbytes(experts)
    part = _unguessed(gpu, others, begun_others, room, lambda early: if_free(early + nbytes))
    reserved = part.reserved + guess.nbytes(entry for entry in entries if EXPERTS in entry.name)
    otherwise = partial(_part, held, None, room, if_free)
    return replace(part, reserved=reserved, guess=partial(guess_requests, experts, gpu, guess), otherwise=otherwise)


def _unguessed(
    gpu: torch.device, entries: Sequence[Entry], begun: Sequence[Entry], room: float, if_free: Callable[[int], int]
) -> FirstTensors:
    sizes = list(map(_least_bytes, entries))
    least = sum(sizes)  # that the model takes for these
    early = _most_early(sizes, int(least * room))
    # A large embedding would otherwise take it all, or end the list.
    in_turn = sorted(begun, key=lambda entry: entry.nbytes > early // 2)
    return FirstTensors(gpu, in_turn, early, least, if_free(early))


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
    """As loops over layers take tensors; those of a layer's experts stay in the order of the file."""
    return sorted(entries, key=lambda entry: natural_key(entry.name.partition(EXPERTS)[0]))


def _spreads_evenly(device_map: Any, *, is_bounded: bool) -> bool:
    """Whether a map will be planned that gives every GPU about as much."""
    if is_bounded or not is_planned(device_map):
        return False
    return torch.cuda.device_count() == 1 or device_map in _EVEN_MAPS


def _most_early(sizes: Sequence[int], least: int) -> int:
    """What the first tensors may take: the largest must have room beside them, as int8."""
    return max(0, min(int(least * _EARLY_PART), least - max(sizes, default=0)))


def _spread(entries: Iterable[Entry], gpus: int, guess: Guess | None, least: int) -> list[FirstTensors]:
    """What each of several GPUs begins with under an even map, whose borders are guessed, if `least` is free on each.

    Away from the borders, where there is enough between them: what another GPU gets would be read again.
    """
    entries = _in_order(entries)
    named = sorted(((_layer(entry.name), entry) for entry in entries), key=lambda pair: _place(*pair))
    layers = [list(layer) for _, layer in itertools.groupby(named, key=lambda pair: pair[0] or pair[1].name)]
    with_experts = guess is not None and guess.are_int8
    model_bytes = [sum(_model_bytes(*pair, with_experts=with_experts) for pair in layer) for layer in layers]
    as_stored = [sum(entry.nbytes for _, entry in layer) for layer in layers]
    # The map must be the same with what is early, even if nothing becomes int8.
    needs = list(map(max, even_needs(model_bytes, gpus), even_needs(as_stored, gpus)))
    experts = {entry.name for entry in guessable(entries)} if guess else set()
    parts = []
    for gpu, held in enumerate(even_parts(model_bytes, gpus)):
        margin = 1 if len(held) > _FEW_LAYERS else 0
        begin = held.start + (margin if gpu > 0 else 0)
        end = held.stop - (margin if held.stop < len(layers) else 0)
        begun = _entries(layers[begin:end])
        mine = _Held(
            torch.device("cuda", gpu),
            _entries(layers[held.start : held.stop]),
            begun,
            [entry for entry in begun if entry.name in experts],
        )
        if_free = partial(_even_if_free, least, needs[gpu])
        parts.append(_part(mine, guess, _SPREAD_PART, if_free))
    return parts


def _even_if_free(least: int, needed: int, early: int) -> int:
    return max(least, needed + early)


def _least_bytes(entry: Entry) -> int:
    """What the model takes at least for it: as int8, if it is a weight."""
    return entry.nbytes * 8 // _BITS.get(entry.dtype, 8)


def _entries(layers: Iterable[list[tuple[str, Entry]]]) -> list[Entry]:
    return [entry for layer in layers for _, entry in layer]


def _layer(name: str) -> str:
    """What goes to one GPU as a whole: a layer ("model.layers.12"); "" for a tensor outside of layers."""
    numbered = re.match(r".*?\.\d+(?=\.)|\d+(?=\.)", name)
    return "" if numbered is None else numbered.group()


def _place(layer: str, entry: Entry) -> tuple[int, int]:
    """In which stack, and where in it: an encoder comes before a decoder, and both before heads; embeddings come before
    layers, and norms outside of layers after them."""
    where = (layer or entry.name).split(".")
    is_last = not layer and not re.search(r"emb|wte|wpe|shared", entry.name)
    is_head = is_last and not {"encoder", "decoder"}.intersection(where)
    stack = 2 if is_head else int("decoder" in where)
    return stack, 2 if is_last else int(layer != "")


def _model_bytes(layer: str, entry: Entry, *, with_experts: bool) -> int:
    """What the model is likely to hold of it: matrices of layers become int8, others stay as they are."""
    becomes_int8 = layer != "" and entry.is_floating and len(entry.torch_shape) == 2
    return entry.numel if becomes_int8 and (with_experts or EXPERTS not in entry.name) else entry.nbytes


def first_gpu(device_map: Any) -> tuple[torch.device, bool] | None:
    """A CUDA device that tensors certainly go to under this map, and whether all of them do; None if there is none."""
    if not torch.cuda.is_available():
        return None
    current = current_gpu()
    if device_map is None:  # torch's default device if that is a GPU (source: transformers, as for the next rule)
        default = torch.get_default_device()
        return (default if default.type == "cuda" and default.index is not None else current), True
    if is_planned(device_map):
        return current, False
    if device_map == "cuda":
        device_map = processes().local_rank
    values = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    devices = {
        torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
        for value in values
        if value != "disk"
    }
    gpus = sorted({current if gpu.index is None else gpu for gpu in devices if gpu.type == "cuda"}, key=str)
    return (gpus[0], len(set(values)) == 1) if gpus else None
