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

Needs POSIX (record locks, positioned writes).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from featcache import layout, partial
from featcache.atomic import clear_leftovers
from featcache.contents import CacheContents, plain
from featcache.errors import InputError
from featcache.journal import Journal, Lock, difference

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
        False: begin anew whatever is there, and leave nothing behind on an exception.

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
    ) -> None:
        self.path = Path(path)
        self.contents = contents.checked()
        _, v, d = self.contents.shape
        self.block_rows = default_block_rows(v, d) if block_rows is None else int(block_rows)
        if self.block_rows < 1:
            raise InputError(f"block_rows is {block_rows}; give at least 1")
        if self.path.is_dir():
            raise InputError(f"{self.path}: is a folder; name a file, such as NAME.h5")
        settled = self.contents.fingerprint() | {"block_rows": self.block_rows}
        self._fingerprint = plain({"run": dict(fingerprint), "contents": settled})
        self._resume = resume
        self._partial: partial.Partial | None = None
        self._journal: Journal | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(partial.beside(self.path, ".lock"), self.path)
        try:
            self._open(overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, overwrite: bool) -> None:
        journal_path = partial.beside(self.path, ".journal")
        clear_leftovers(journal_path)
        if self._resume and journal_path.exists():
            self._journal = Journal(journal_path)
            if self._was_renamed(self._journal):
                return  # the last run was killed before its last step; finish() takes that
        if self.path.exists() and not overwrite:
            raise InputError(
                f"{self.path}: exists already; pass --overwrite (overwrite=True) to replace it, "
                "or choose another --out"
            )
        journal = self._journal
        if journal is not None and journal.skeletons:
            if journal.fingerprint == self._fingerprint:
                self._partial = partial.resume(self.path, self.contents, self.block_rows, journal)
                return
            if not overwrite:
                raise InputError(
                    f"{partial.beside(self.path, '.partial')}: was begun with other settings; "
                    "pass --overwrite (overwrite=True) to give it up, or choose another --out\n"
                    + difference(journal.fingerprint, self._fingerprint)
                )
        if journal is not None:
            journal.close()
        self._partial = partial.begin(self.path, self.contents, self.block_rows, self._fingerprint)

    def _was_renamed(self, journal: Journal) -> bool:
        """Whether the target is the outcome of just this run."""
        if partial.beside(self.path, ".partial").exists():
            return False
        if journal.fingerprint != self._fingerprint:
            return False
        try:
            done = layout.read(self.path)
        except InputError:
            return False
        blocks = [(block.start, block.sha256) for block in journal.sorted_blocks()]
        return done.blocks() == blocks and done.provenance.get("fingerprint") == self._digest()

    def _digest(self) -> str:
        text = json.dumps(self._fingerprint, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def messages(self) -> list[str]:
        """What was found damaged and is made again; one line each."""
        return [] if self._partial is None else self._partial.messages

    def pending(self) -> list[tuple[int, int]]:
        """Blocks (start, stop) that are not durable yet, in order."""
        return [] if self._partial is None else self._partial.pending()

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
        if self._partial is None or not self._partial.is_pending(start):
            raise ValueError(f"{self.path}: row {start} begins no pending block; see pending()")
        stop = self._partial.stop_of[start]
        rows = self._rounded(start, stop, np.asarray(features), reasons)
        bad = tuple((start + i, why) for i, why in enumerate(reasons) if why is not None)
        self._partial.store(start, rows, bad)

    def _rounded(
        self, start: int, stop: int, features: np.ndarray, reasons: Sequence[str | None]
    ) -> np.ndarray:
        """The rows as they go into the file."""
        _, v, d = self.contents.shape
        if features.shape != (stop - start, v, d) or len(reasons) != stop - start:
            raise ValueError(
                f"features of shape {features.shape} with {len(reasons)} reasons, expected "
                f"{(stop - start, v, d)} and {stop - start} for the block at row {start}"
            )
        good = np.array([reason is None for reason in reasons])
        rows = np.zeros(features.shape, layout.FEATURE_DTYPE)
        with np.errstate(over="ignore"):
            rows[good] = features[good]
        if not np.isfinite(rows).all():
            i, j, k = np.argwhere(~np.isfinite(rows))[0]
            raise InputError(
                f"image {self.contents.ids[start + i]}, view {self.contents.views[j]}, "
                f"dimension {k}: feature {features[i, j, k]} is no float16 number "
                "(at most 65504); check the image and the network, or scale its features"
            )
        return rows

    def finish(self, provenance_update: Mapping[str, Any] | None = None) -> Path:
        """Hash every block once more, complete the file and move it to the target.

        Parameters
        ----------
        provenance_update : dict, optional
            Added to the provenance of `contents`: what is known only now.

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
        if self._partial is not None:
            bad = self._partial.drop_bad_blocks()
            if bad:
                raise InputError(
                    f"{self._partial.path}: {len(bad)} blocks, the first at row {bad[0].start}, "
                    "are not what was written; check the disk and run the same command again"
                )
            self._partial.complete(self.path, self._provenance(provenance_update or {}))
            self._journal = self._partial.journal
        if self._journal is not None:
            self._journal.remove()
        self._lock.release()
        return self.path

    def _provenance(self, update: Mapping[str, Any]) -> dict[str, Any]:
        known = {**self.contents.provenance, **update, "fingerprint": self._digest()}
        if self.contents.labels is not None:
            known["unlisted"] = self.contents.labels.unlisted
        return known

    def close(self) -> None:
        """Let go of all files; what is done stays for the next run."""
        if self._partial is not None:
            self._partial.close()
        if self._journal is not None:
            self._journal.close()
        self._lock.release()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self._resume:
            partial.discard(self.path)
        self.close()
