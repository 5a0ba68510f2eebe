"""One conversion by many ranks: each writes whole files of its own, and one of them puts the folder in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyint8.checkpoint.identity import digest
from pyint8.checkpoint.journal import Journal
from pyint8.checkpoint.journals import journal_file
from pyint8.errors import OptionError
from pyint8.host.locks import lock, unlock
from pyint8.host.writing import write_errors
from pyint8.operations.conversions import ConversionPlan, completed, files_of, identity_of_work, staged

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pyint8.models.converted_files import ConvertedFiles
    from pyint8.report import Recorder
    from pyint8.streaming.preparation import Preparation
    from pyint8.streaming.ranks.apart import Apart
    from pyint8.streaming.ranks.ranks import Ranks

Noted = Mapping[str, int | None]


def write_together(
    plan: ConversionPlan,
    target: str,
    device: torch.device,
    preparation: Preparation,
    recorder: Recorder,
    complete: Callable[[str], None],
    ranks: Ranks,
) -> None:
    """As `write_converted`, by all ranks: within their block, at whose end the folder is complete.

    Raises:
        OptionError: The ranks do not write the same to the same folder.
        RankError: Another rank failed.
        Pyint8Error: A tensor of this rank's files cannot be read, quantized or written.
    """
    from pyint8.models.transformers.saving import description

    identity = identity_of_work(plan, device)
    _require_same(ranks.meet("the conversion", [identity, digest(description(plan.model)), target]))
    part = _Part(plan, identity, device, preparation, recorder, ranks)
    if ranks.rank:
        folder, number, noted = ranks.meet("the folder", None)[0]
        _require_shared(folder, number, target)
        with recorder.phase("stream"):
            part.write(folder, noted)
        return
    with staged(target, identity, recorder) as (folder, noted), ranks.telling():
        ranks.meet("the folder", [folder, os.stat(folder).st_ino, noted])
        part.write(folder, noted)
        completed(plan, folder, complete)


def _require_same(said: list[list[str]]) -> None:
    if any(one != said[0] for one in said):
        raise OptionError(
            "the ranks are about to convert different things; all must call it alike: the same source, folder, kind of "
            "device, arguments and versions"
        )


def _require_shared(folder: str, number: int, target: str) -> None:
    """Of hosts that have no file system in common, each would have its own files."""
    try:
        is_same = os.stat(folder).st_ino == number
    except OSError:
        is_same = False
    if not is_same:
        raise OptionError(
            f"{target} is not the same folder for all ranks; give one in a file system that all hosts have in common"
        )


class _Part:
    """What one rank does of a conversion."""

    def __init__(
        self,
        plan: ConversionPlan,
        identity: str,
        device: torch.device,
        preparation: Preparation,
        recorder: Recorder,
        ranks: Ranks,
    ) -> None:
        self._plan, self._identity, self._device = plan, identity, device
        self._preparation, self._recorder, self._ranks = preparation, recorder, ranks

    def write(self, folder: str, noted: Noted) -> None:
        """Writes this rank's files; returns once all have written theirs, and the first has written the index."""
        plan, rank = self._plan, self._ranks.rank
        others = plan.conversion.shards.names_of_others(rank, self._ranks.size)
        with (
            _journal(folder, rank, self._identity, noted) as journal,
            files_of(plan, folder, journal, others) as files,
        ):
            self._write(files, journal.done | others)
            checksums = self._ranks.meet("checksums", files.checksums)
            if rank == 0:
                files.write_index({name: value for of_rank in checksums for name, value in of_rank.items()})

    def _write(self, files: ConvertedFiles, done: frozenset[str]) -> None:
        plan, checkpoint = self._plan, self._plan.load.checkpoint
        with self._ranks.apart() as apart:
            plan.conversion.run(_Heeding(files, apart), done, [self._device], self._preparation, self._recorder)
            files.finish()
            checkpoint.require_unchanged(checkpoint.files)
            apart.finish()


class _Heeding:
    """Files that take nothing more once another rank has failed."""

    def __init__(self, files: ConvertedFiles, apart: Apart) -> None:
        self._files, self._apart = files, apart

    def put(self, name: str, value: torch.Tensor) -> None:
        self._apart.check()
        self._files.put(name, value)

    @property
    def waits(self) -> bool:
        return self._files.waits

    def note_sound(self) -> None:
        self._files.note_sound()


@contextmanager
def _journal(folder: str, rank: int, identity: str, noted: Noted) -> Iterator[Any]:
    """This rank's journal; locked, so that nobody takes it for that of a process that is gone."""
    file = journal_file(folder, rank)
    with Journal(file, identity, noted) as journal:
        with write_errors(file):
            locked = lock(file)
        try:
            yield journal
        finally:
            if locked is not None:
                unlock(locked)
