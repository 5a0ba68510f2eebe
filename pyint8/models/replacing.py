"""Puts what is made of a checkpoint into the memory that a model has, a few tensors at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, Protocol

import torch

from pyint8.errors import CheckpointError, PartlyReplacedError, Pyint8Error, first_names
from pyint8.models.live import Place

logger = logging.getLogger(__name__)

MOST_BYTES = 256 << 20
"""Of what is made for each GPU at a time."""
# So many are checked before they are written, while others are made.
_CHECKED_BYTES = MOST_BYTES // 4

Places = Mapping[str, Sequence[Place]]
"""Where values go, by the names they are made under: to several places where a model ties what another has apart."""


class Maker(Protocol):
    """What makes values from a checkpoint."""

    def make(self, name: str, loading_info: Any) -> dict[str, torch.Tensor]:
        """The values that come of one target, by name."""

    def wait(self, name: str) -> None:
        """Until they are ordered before the devices' current streams."""

    def release(self, name: str) -> None:
        """Makes room for others."""


class Replacement:
    """One reload's writes.

    Args:
        places: Where each value goes.
        check: Raises if something that was made since the last call cannot be used.
    """

    def __init__(self, places: Places, check: Callable[[], None]) -> None:
        self._places = places
        self._check = check
        self._made: dict[str, dict[str, torch.Tensor]] = {}
        self._nbytes = 0
        self._done: list[str] = []
        self._torn: str | None = None

    def run(self, names: Iterable[str], maker: Maker) -> None:
        """Replaces what a maker makes for the targets of these names, in order; within `reported`."""
        for name in names:
            self._made[name] = maker.make(name, None)
            self._nbytes += sum(value.nbytes for value in self._made[name].values())
            if self._nbytes >= _CHECKED_BYTES:
                self._write(maker)
        self._write(maker)

    def _write(self, maker: Maker) -> None:
        for name in self._made:
            maker.wait(name)
        self._check()
        for name in list(self._made):
            self._put(name)
            maker.release(name)  # nothing holds the values any more: more may be made where they were
        self._nbytes = 0

    def _put(self, target: str) -> None:
        for name, value in self._made.pop(target).items():
            for place in self._places[name]:
                self._torn = place.name
                place.put(value)
                self._done.append(place.name)
                self._torn = None

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Errors within say what was replaced.

        Raises:
            PartlyReplacedError: Of any error after the first write; its cause is that error.
        """
        try:
            yield
        except BaseException as error:
            if not self._done and self._torn is None:
                raise
            problem = self._problem()
            if not isinstance(error, Exception):
                logger.error("%s", problem)
                raise
            located = error if isinstance(error, Pyint8Error) else Pyint8Error(f"{type(error).__name__}: {error}")
            raise PartlyReplacedError(
                f"{problem}. What happened: {located.problem}",
                path=located.path,
                tensor=located.tensor,
                offset=located.offset,
                replaced=self._done,
                torn=self._torn,
            ) from error

    def _problem(self) -> str:
        total = sum(map(len, self._places.values()))
        torn = "" if self._torn is None else f"; {self._torn} was being written, and may have some of both"
        return (
            f"{len(self._done)} of {total} tensors of the model have their new values ({first_names(self._done)}), "
            f"the others those that they had{torn}: it is neither the old model nor the new until a reload succeeds"
        )


def by_turns(names: Iterable[str], device_of: Callable[[str], torch.device]) -> list[str]:
    """Names in an order in which each of several GPUs has its turn, so that all are fed; else in the order they have.

    Those of one device stay in order.
    """
    groups: dict[torch.device, list[str]] = {}
    for name in (given := list(names)):
        groups.setdefault(device_of(name), []).append(name)
    if sum(device.type == "cuda" for device in groups) < 2:
        return given
    return [name for name in chain.from_iterable(zip_longest(*groups.values())) if name is not None]


def require_all(lost: Collection[str], checkpoint_file: str, *, strict: bool) -> None:
    """Refuses (without `strict`, warns of) parameters and buffers that would keep the values they have.

    Raises:
        CheckpointError: There are such.
    """
    if not lost:
        return
    named = first_names(sorted(lost), 5)
    if strict:
        raise CheckpointError(
            f"the checkpoint in {checkpoint_file} has no values for {named}, which would stay as they are beside new "
            "ones. Nothing was replaced; with strict=False they stay",
            tensor=min(lost),
        )
    logger.warning("not in the checkpoint, so left as they are: %s", named)


def require_alike(
    names: Iterable[str], places: Mapping[str, Place], are_alike: Callable[[str, str], bool]
) -> dict[str, str]:
    """Of names whose values go to the same memory, those that are left out, with the one that is written instead.

    Raises:
        CheckpointError: Their values differ.
    """
    first: dict[Any, str] = {}
    left_out: dict[str, str] = {}
    for name in names:
        other = first.setdefault(places[name].address, name)
        if other == name or not places[name].values[0].numel():
            continue
        if not are_alike(other, name):
            raise CheckpointError(
                f"it is tied to {other} in the model, which has memory for one of them, and their values in the "
                "checkpoint differ. Nothing was replaced; load the model again",
                tensor=name,
            )
        left_out[name] = other
    return left_out
