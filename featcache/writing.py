"""How does a cache come to be on disk, whatever happens meanwhile?

Beside the target ``x.h5`` a run keeps

``x.h5.partial``
    the HDF5 file with everything but the features, and room for those;
``x.h5.journal``
    one line for each block of rows that is durable, with its hash;
``x.h5.lock``
    who is writing, free again when that process ends.

HDF5 is used at the very beginning and the very end only (see
:mod:`featcache.partial`), so that processes may be forked and killed in between.
A process that is killed leaves partial and journal, and the next
:class:`CacheWriter` with equal arguments goes on from them. The target appears
at the end, whole, by a rename. To give a run up, delete the three files.

Several processes may write one cache together, each its :class:`~featcache.shares.Share`
of the blocks in a partial, a journal and a lock of its own. They need not run at the same
time nor know of each other: whoever finds that all is there and nobody at work copies
the blocks together. ``x.h5.gate`` is held for the moments of beginning and finishing.

Needs POSIX (record locks, positioned writes).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from featcache import layout, partial
from featcache.arrays import as_rows
from featcache.atomic import clear_leftovers
from featcache.contents import CacheContents, plain
from featcache.disk import sync
from featcache.errors import InputError
from featcache.journal import Block, Journal, difference
from featcache.outcome import digest, is_outcome, refuse_existing, was_renamed
from featcache.shares import Share, shares_of
from featcache.team import Team

__all__ = ["CacheContents", "CacheWriter", "default_block_rows"]

_BLOCK_BYTES = 2**24


def default_block_rows(views: int, dim: int) -> int:
    """Rows that make a block of 16 MiB: few enough fsyncs, little to do again after a kill."""
    return max(1, _BLOCK_BYTES // (views * dim * layout.FEATURE_DTYPE.itemsize))


class CacheWriter:
    """Writes one cache, block by block, in any order, over any number of runs.

    Parameters
    ----------
    path : path
        The target; missing folders are made.
    contents : CacheContents
        Everything but the features.
    fingerprint : dict
        Whatever else the features depend on (network, preprocessing, threads, ...),
        as JSON. A run is only continued with an equal fingerprint, equal
        `contents` (but for `provenance`) and equal `block_rows`.
    block_rows : int, optional
        Rows of a block: block i is rows [i * block_rows, min(n, (i + 1) * block_rows)).
    overwrite : bool
        Replace an existing target (at the very end; till then it stays) and give
        up a run that was begun with other settings.
    resume : bool
        False: begin anew even what was begun with these settings, and leave nothing behind on
        an exception.
    share : Share
        Of several processes that write the cache together: the blocks of this one.

    Attributes
    ----------
    finished : bool
        Whether the target is there; after :meth:`finish` False if others are still at work.

    Raises
    ------
    InputError
        If the target exists, another process writes it, a run with other
        settings is under way, or the disk has no room.

    Notes
    -----
    A context manager. An exception, like a kill, leaves what a later run needs.
    Forked processes may be started at any time between two calls. Not for
    several threads at once. Memory: one block, and the contents.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        contents: CacheContents,
        *,
        fingerprint: Mapping[str, Any],
        block_rows: int | None = None,
        overwrite: bool = False,
        resume: bool = True,
        share: Share = Share(),  # noqa: B008 - immutable
    ) -> None:
        self.path = Path(path)
        self.contents = contents.checked()
        _, v, d = self.contents.shape
        self.block_rows = default_block_rows(v, d) if block_rows is None else int(block_rows)
        if self.block_rows < 1:
            raise InputError(f"block_rows is {block_rows}; give at least 1")
        refuse_existing(self.path, overwrite=True)
        settled = self.contents.fingerprint() | {"block_rows": self.block_rows}
        self._fingerprint = plain({"run": dict(fingerprint), "contents": settled})
        self.finished = False
        self._resume = resume
        self._share = share
        self._grid = share.grid(len(self.contents.ids), self.block_rows)
        self._partial: partial.Partial | None = None
        self._elsewhere: dict[int, int] = {}  # blocks of ours that other processes have made
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.path.parent}: no folder, and cannot become one ({error.strerror}); "
                "choose another --out"
            ) from None
        self._team = Team(self.path, share)
        with self._team.gate():
            self._lock = self._team.lock(self._team.own)
            with self._closed_on_error():
                journal = self._begin(overwrite)
        with self._closed_on_error():
            self._go_on(journal)

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _begin(self, overwrite: bool) -> Journal | None:
        """Agree with all others on what is written; our own journal if it can be gone on with."""
        own, journal_path = self._team.own, self._team.own.beside(self.path, ".journal")
        clear_leftovers(journal_path)
        if self._resume and was_renamed(self._team, self._fingerprint):
            return None  # the last run was killed before its last step; finish() takes that
        if self.path.exists() and not overwrite:
            if self._share.world > 1 and is_outcome(self.path, self._fingerprint):
                self.finished = True  # the others were quick
                return None
            refuse_existing(self.path, overwrite)
        self._agree(overwrite)
        if journal_path.exists():
            return Journal(journal_path)
        if self._grid.rows:
            self._partial = partial.begin(
                self.path, self.contents, self.block_rows, self._fingerprint, own
            )
        return None

    def _agree(self, overwrite: bool) -> None:
        """Refuse, or give up, what was begun with other settings."""
        for share, journal in self._team.journals(shares_of(self.path)):
            if journal.skeletons:
                same = journal.fingerprint == self._fingerprint
                if same and self._resume:
                    continue
                if not same and not overwrite:
                    raise InputError(
                        f"{share.beside(self.path, '.partial')}: was begun with other settings; "
                        "pass --overwrite (overwrite=True) to give it up, or choose another "
                        "--out\n" + difference(journal.fingerprint, self._fingerprint)
                    )
            self._team.give_up(share)

    def _go_on(self, journal: Journal | None) -> None:
        """Hash what is there already, which takes a while: not at the gate."""
        if journal is not None:
            self._partial = partial.resume(
                self.path, self.contents, self.block_rows, journal, self._share
            )
        if self._partial is None:
            return
        for share, other in self._team.journals(self._team.others()):
            path = share.beside(self.path, ".partial")
            self._elsewhere |= partial.sound_blocks(path, self.contents, other, self._grid)

    @property
    def messages(self) -> list[str]:
        """What was found damaged and is made again; one line each."""
        return [] if self._partial is None else self._partial.messages

    def pending(self) -> list[tuple[int, int]]:
        """Blocks (start, stop) of ours that are not durable yet, in order."""
        if self._partial is None:
            return []
        return [item for item in self._partial.pending() if self._is_pending(item[0])]

    def _is_pending(self, start: int) -> bool:
        return (
            start in self._grid.mine
            and start not in self._elsewhere
            and self._partial is not None
            and start not in self._partial.journal.blocks
        )

    def rows_done(self) -> int:
        """Rows that are durable, whoever has made them."""
        own = {} if self._partial is None else self._partial.journal.blocks
        return self.rows_elsewhere() + sum(block.stop - block.start for block in own.values())

    def rows_elsewhere(self) -> int:
        """Rows that are durable in the files of other processes alone."""
        own = {} if self._partial is None else self._partial.journal.blocks
        done = {
            block.start: block.stop
            for _, journal in self._team.journals(self._team.others())
            for block in journal.blocks.values()
            if block.start not in self._grid.mine
        }
        # Which of ours they have, undamaged, was seen at the beginning.
        done |= self._elsewhere
        return sum(stop - start for start, stop in done.items() if start not in own)

    def write(self, start: int, features: np.ndarray, reasons: Sequence[str | None]) -> None:
        """Write a block; once this returns it survives anything.

        Parameters
        ----------
        start : int
            First row of a pending block.
        features : (m, v, d) float
            Rounded to float16. Rows with a reason are ignored and become zeros.
        reasons : sequence of m
            Why an image has no features; None where it has.

        Raises
        ------
        InputError
            If a feature is not a finite float16 (names id, view and dimension) or
            the disk is full.
        """
        if not self._is_pending(start):
            raise ValueError(f"{self.path}: row {start} begins no pending block; see pending()")
        assert self._partial is not None
        shape = (self._grid.stop_of[start] - start, *self.contents.shape[1:])
        if features.shape != shape or len(reasons) != shape[0]:
            raise ValueError(
                f"features of shape {features.shape} with {len(reasons)} reasons, expected "
                f"{shape} and {shape[0]} for the block at row {start}"
            )
        rows = as_rows(self.contents, start, features, reasons)
        bad = tuple((start + i, why) for i, why in enumerate(reasons) if why is not None)
        self._partial.store(start, rows, bad)

    def take(self, path: Path, journal: Journal) -> None:
        """Copy the sound blocks of a partial file from elsewhere that are not here yet."""
        if self._partial is not None:
            self._partial.take(path, journal)

    def finish(
        self,
        provenance_update: Mapping[str, Any] | None = None,
        wait: Callable[[], bool] = lambda: False,
    ) -> Path:
        """Hash every block once more, complete the file and move it to the target.

        As long as other processes are at work on their shares this one goes, and the last
        one does that; `finished` says whether the target is there.

        Parameters
        ----------
        provenance_update : dict, optional
            Added to the provenance of `contents`: what is known only now.
        wait : function
            Asked again and again while others are at work; True: stay. It should sleep.

        Returns
        -------
        path : Path
            The target.

        Raises
        ------
        InputError
            If a block is not what was written; it is pending again.
        """
        pending = self.pending()
        if pending:
            raise ValueError(
                f"{self.path}: {len(pending)} blocks are not written yet, the first at row "
                f"{pending[0][0]}"
            )
        leave = False
        while not self.finished:
            with contextlib.ExitStack() as held:
                with self._team.gate():
                    alone = self._team.lock_others(held)
                    if alone:
                        self.finished = self._complete(provenance_update or {})
                    if not self.finished and (alone or leave):
                        # At the gate, or two who leave at once would rely on each other.
                        self.close()
                        break
                if self.finished:
                    Share().beside(self.path, ".journal").unlink(missing_ok=True)
                    sync(self.path.parent)
            leave = not self.finished and not wait()
        self.close()
        return self.path

    def _complete(self, update: Mapping[str, Any]) -> bool:
        """Put everything together, if everything is there; nobody else is at work."""
        if not was_renamed(self._team, self._fingerprint):
            if self.rows_done() < len(self.contents.ids):
                return False
            with contextlib.ExitStack() as opened:
                main = self._main(opened)
                bad = main.drop_bad_blocks() + self._gather(main)
                if bad:
                    raise InputError(
                        f"{main.path}: {len(bad)} blocks, the first at row {bad[0].start}, "
                        "are not what was written; check the disk and run the same command again"
                    )
                main.complete(
                    self.path,
                    self.contents.recorded({**update, "fingerprint": digest(self._fingerprint)}),
                )
        for share in shares_of(self.path):
            if share.rank:
                share.discard(self.path)
        return True

    def _main(self, opened: contextlib.ExitStack) -> partial.Partial:
        """The file that has room for all rows."""
        if self._team.own == Share() and self._partial is not None:
            return self._partial
        journal_path = Share().beside(self.path, ".journal")
        arguments = self.path, self.contents, self.block_rows
        if journal_path.exists():
            main = partial.resume(*arguments, Journal(journal_path), Share())
        else:
            main = partial.begin(*arguments, self._fingerprint, Share())
        opened.callback(main.close)
        return main

    def _gather(self, main: partial.Partial) -> list[Block]:
        """Copy the blocks of the other processes; those whose bytes are wrong are returned."""
        bad = []
        for share, journal in self._team.journals(shares_of(self.path)):
            if share.rank:
                bad += main.take(share.beside(self.path, ".partial"), journal)
        return bad

    def close(self) -> None:
        """Let go of all files; what is done stays for the next run."""
        if self._partial is not None:
            self._partial.close()
        self._lock.release()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self._resume and not self.finished:
            self._share.discard(self.path)
        self.close()
