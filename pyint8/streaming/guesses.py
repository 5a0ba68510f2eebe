"""What a load is likely to make of a mixture's experts, by their names: so they land in their place before it is known.

A plan takes as long as half of the bytes do. Guessed requests are those of a plan, and it says whether they were right.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from pyint8.streaming.natural_order import natural_key
from pyint8.streaming.requests import KERNEL_DTYPES, Part, TensorRequest, ToDtype, ToInt8, is_plain

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry

EXPERTS = ".experts."
# Weights of an expert, as checkpoints name them: those of the first two lie in one parameter.
_FAMILIES = (("gate_proj.weight", "up_proj.weight", "down_proj.weight"), ("w1.weight", "w3.weight", "w2.weight"))


class Guess(NamedTuple):
    """What becomes of weights.

    Attributes:
        are_int8: Experts become codes and scales; else values.
        dtype: Of the model; None for what they are stored in.
        quantizer: The address of bitsandbytes' `cint8_vector_quant`, if there is one.
        is_16_bit: Whether it is known that no part of the model is loaded in more than 16 bit, but for what its class
            keeps in fp32.
    """

    are_int8: bool
    dtype: torch.dtype | None = None
    quantizer: int | None = None
    is_16_bit: bool = False

    def nbytes(self, entries: Iterable[Entry]) -> int:
        """What a model takes for weights of experts."""
        if not self.are_int8 and self.dtype is None:
            return sum(entry.nbytes for entry in entries)
        shapes = Counter(entry.shape for entry in entries)  # few
        elements = sum(count * prod(shape) for shape, count in shapes.items())
        if self.dtype is not None and not self.are_int8:
            return elements * self.dtype.itemsize
        return elements + sum(count * sum(shape[:1]) for shape, count in shapes.items()) * torch.float32.itemsize


class Guessed(NamedTuple):
    """Requests that a plan is likely to have.

    Attributes:
        requests: In the order in which they are served.
        quantizer: The address of bitsandbytes' `cint8_vector_quant`, if there is one.
    """

    requests: list[TensorRequest]
    quantizer: int | None


def guessable(entries: Iterable[Entry]) -> list[Entry]:
    """Those of experts, if they are as usual, but for the last module: some checkpoints have one more, which predicts
    further tokens.
    """
    modules: dict[str, list[Entry]] = {}
    for entry in entries:
        head, experts, _ = entry.name.partition(EXPERTS)
        if experts:
            modules.setdefault(head, []).append(entry)
    modules.pop(max(modules, key=natural_key, default=""), None)
    first = next(iter(modules.values()), [])
    weights = {entry.name.partition(EXPERTS)[2].partition(".")[2] for entry in first}
    is_usual = any(weights == set(family) for family in _FAMILIES) and first[0].dtype in KERNEL_DTYPES
    return list(itertools.chain.from_iterable(modules.values())) if is_usual else []


def guess_requests(entries: Iterable[Entry], device: torch.device, guess: Guess) -> Guessed:
    """Those for the weights of experts, in the order of layers; of each expert by expert."""
    modules: dict[str, dict[str, dict[str, Entry]]] = {}  # by the name before "experts", the weight, and the number
    for entry in entries:
        head, experts, rest = entry.name.partition(EXPERTS)
        if experts:
            number, _, weight = rest.partition(".")
            modules.setdefault(head, {}).setdefault(weight, {})[number] = entry
    requests: list[TensorRequest] = []
    for head in sorted(modules, key=natural_key):
        for family in _FAMILIES:
            if modules[head].keys() == set(family):
                first, second, last = (_in_order(modules[head][weight]) for weight in family)
                requests += _requests(f"{head}.1", [first, second], device, guess)
                requests += _requests(f"{head}.2", [last], device, guess)
    return Guessed(requests, guess.quantizer)


def _in_order(by_number: dict[str, Entry]) -> list[Entry]:
    """Those of experts 0, 1, ...; empty where some are missing."""
    found = [by_number.get(str(number)) for number in range(len(by_number))]
    return [entry for entry in found if entry is not None] if None not in found else []


def _requests(name: str, stacks: Sequence[Sequence[Entry]], device: torch.device, guess: Guess) -> list[TensorRequest]:
    """Of a parameter [experts, out, in], `out` being that of all stacks together."""
    dtypes = {entry.dtype for stack in stacks for entry in stack}
    shapes = [{entry.shape for entry in stack} for stack in stacks]
    if any(len(shape) != 1 for shape in shapes) or len(dtypes) != 1 or len({len(stack) for stack in stacks}) != 1:
        return []
    stored = KERNEL_DTYPES.get(next(iter(dtypes)))
    each = [next(iter(shape)) for shape in shapes]
    if stored is None or any(len(shape) != 2 or shape[1] != each[0][1] for shape in each):
        return []
    if not all(is_plain(entry) for stack in stacks for entry in stack):
        return []
    dtype = guess.dtype or stored
    becomes = ToInt8(dtype) if guess.are_int8 else ToDtype(dtype)
    inner, out = each[0][1], sum(rows for rows, _ in each)
    shape = (len(stacks[0]), out, inner)
    requests: list[TensorRequest] = []
    element = 0
    for entries in zip(*stacks, strict=True):
        for entry in entries:
            requests.append(TensorRequest(entry, device, guess.are_int8, None, becomes, Part(name, shape, element)))
            element += entry.numel
    return requests


def are_right(guessed: Iterable[TensorRequest], wanted: Iterable[TensorRequest]) -> bool:
    """Whether all that was guessed is wanted, once, and comes to the same there."""
    own = {request.entry.name: request for request in guessed}
    found: set[str] = set()
    parameters: dict[str, str] = {}  # the model's, by those of the guess
    for other in wanted:
        name = other.entry.name
        request = own.get(name)
        if request is None:
            continue
        if name in found or other.part is None or request.part is None or not _is_right(request, other):
            return False
        found.add(name)
        if parameters.setdefault(request.part.name, other.part.name) != other.part.name:
            return False
    return len(found) == len(own) and len(set(parameters.values())) == len(parameters)


def _is_right(guessed: TensorRequest, wanted: TensorRequest) -> bool:
    assert guessed.part is not None
    assert wanted.part is not None
    is_there = guessed.part.shape == wanted.part.shape and guessed.part.offset == wanted.part.offset
    is_it = guessed.entry is wanted.entry or guessed.entry == wanted.entry
    is_same = is_there and is_it and guessed.device == wanted.device
    return is_same and _come_to_the_same(guessed.entry, guessed.becomes, wanted.becomes)


def _come_to_the_same(entry: Entry, one: ToInt8 | ToDtype | None, other: ToInt8 | ToDtype | None) -> bool:
    """Of bf16 codes are the same whatever the model's dtype is: fp16 and fp32 hold all that fp16 holds of it."""
    if one == other:
        return True
    if not isinstance(one, ToInt8) or not isinstance(other, ToInt8) or one.transposed != other.transposed:
        return False
    rounds = {each.model_dtype == torch.bfloat16 != entry.torch_dtype for each in (one, other)}
    return len(rounds) == 1
