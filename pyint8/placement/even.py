"""Where an even map of several GPUs will put the parts of a model, while there is no model to plan with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# transformers leaves room for the largest part beside a GPU's share.
# Source: transformers' get_balanced_memory and infer_auto_device_map.
_ROOM = 1.25
# The part of what a GPU may hold that is used for int8 models (transformers' Bnb8BitHfQuantizer.adjust_max_memory).
_USED = 0.9


def even_needs(sizes: Sequence[int], gpus: int) -> list[int]:
    """How much memory each GPU must have free for the map to be as if there were any amount; sizes as below."""
    share = _even_share(sizes, gpus)
    # The last one may use all that it has.
    return [max(share, int(sum(sizes[held.start : held.stop]) / _USED)) for held in even_parts(sizes, gpus)]


def even_parts(sizes: Sequence[int], gpus: int) -> list[range]:
    """The parts that each GPU will hold, as transformers plans "auto" and "balanced" where every GPU is large enough.

    It is a guess: which parts there are, in which order, and how large is known for sure only with the model.

    Args:
        sizes: Of the parts that are never split, a layer each, in bytes as the model will hold them, in its order.
        gpus: How many, at least one.

    Returns:
        For each GPU a range of indices, which may be empty.
    """
    limit = _USED * _even_share(sizes, gpus)
    largest_after = [0] * len(sizes)
    for index in reversed(range(len(sizes) - 1)):
        largest_after[index] = max(sizes[index + 1], largest_after[index + 1])
    borders = [0]
    used = 0
    for index, size in enumerate(sizes):
        # The first GPU keeps room for what might not fit anywhere, and would come to it for each forward pass.
        while len(borders) < gpus and used + size > limit - (largest_after[index] if len(borders) == 1 else 0):
            borders.append(index)
            used = 0
        used += size
    borders += [len(sizes)] * (gpus + 1 - len(borders))
    return list(itertools.starmap(range, itertools.pairwise(borders)))


def _even_share(sizes: Sequence[int], gpus: int) -> int:
    """How much of each GPU's free memory transformers would use at most, where it is so much."""
    return int(sum(sizes) / gpus + _ROOM * max(sizes, default=0))
