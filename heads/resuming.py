"""What has a killed prediction left behind, and does it belong to this one?

Beside the submission lies ``.NAME.partial``: a line that tells the job, then a record for every
chunk of images: a line with its size and a checksum, and its label sets as arrays. A record that is
cut off or of another checksum ends what counts.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from scipy.sparse import csr_matrix, vstack

from featcache.disk import explained
from featcache.journal import Lock


def job_of(
    files: Sequence[str | os.PathLike[str]], strict: bool, named: Mapping[str, str] | None = None
) -> dict[str, object]:
    """What makes two predictions the same: files by place, size and time of change, and names."""

    def facts(path: str | os.PathLike[str]) -> list[object]:
        stat = os.stat(path)
        return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]

    return {
        "files": [facts(path) for path in files],
        "named": {name: facts(path) for name, path in (named or {}).items()},
        "strict": strict,
    }


def refuse_repeats(path: str | os.PathLike[str], ids: np.ndarray) -> None:
    """A submission has one row an image.

    Raises
    ------
    ValueError
        Naming an image that there are several of.
    """
    once, count = np.unique(ids, return_counts=True)
    if count.max(initial=1) > 1:
        name = str(once[np.argmax(count)])
        raise ValueError(
            f"{path}: has image {name!r} {count.max()} times; a submission names it once"
        )


class ChosenSets:
    """Label sets of the first images, safe on disk; nobody else writes them meanwhile.

    Parameters
    ----------
    out : path
        Of the submission.
    job : dict
        JSON. Label sets of another job are thrown away.
    n_labels : int

    Attributes
    ----------
    rows : int
        Images that are done.

    Raises
    ------
    ValueError
        If another process writes the same submission.
    """

    def __init__(self, out: str | os.PathLike[str], job: dict[str, object], n_labels: int) -> None:
        target = Path(out)
        self.path = target.parent / f".{target.name}.partial"
        self._target, self._n_labels, self._parts = (
            target,
            n_labels,
            [csr_matrix((0, n_labels), dtype=bool)],
        )
        self._head = json.dumps(job | {"labels": n_labels}).encode() + b"\n"
        self.rows = 0

    def __enter__(self) -> ChosenSets:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.path.with_suffix(".lock"), self._target)
        try:
            self._file = self._opened()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._lock.release()

    def _opened(self) -> BinaryIO:
        self.path.touch()
        file = open(self.path, "r+b")  # noqa: SIM115 - closed at the end of the job
        if file.readline() != self._head:
            file.seek(0)
            file.truncate()
            self._write(file, self._head)
            return file
        end = file.tell()
        for part in self._records(file):
            self._parts.append(part)
            self.rows += part.shape[0]
            end = file.tell()
        file.seek(end)
        file.truncate()
        return file

    def _records(self, file: BinaryIO) -> Iterator[csr_matrix]:
        """Those that are whole."""
        while line := file.readline():
            try:
                rows, entries, checksum = json.loads(line)
                data = file.read(4 * (rows + 1 + entries))
            except (ValueError, TypeError):
                return
            if len(data) != 4 * (rows + 1 + entries) or zlib.crc32(data) != checksum:
                return
            numbers = np.frombuffer(data, np.int32)
            yield csr_matrix(
                (np.ones(entries, bool), numbers[rows + 1 :], numbers[: rows + 1]),
                shape=(rows, self._n_labels),
            )

    def append(self, sets: csr_matrix) -> None:
        """Add the label sets of the next images; on return they are on disk."""
        data = sets.indptr.astype(np.int32).tobytes() + sets.indices.astype(np.int32).tobytes()
        line = json.dumps([sets.shape[0], sets.nnz, zlib.crc32(data)]).encode() + b"\n"
        self._write(self._file, line + data)
        self._parts.append(sets)
        self.rows += sets.shape[0]

    def _write(self, file: BinaryIO, data: bytes) -> None:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, self._target, len(data)) from error

    def sets(self) -> csr_matrix:
        """(rows, K) bool of all images that are done."""
        return csr_matrix(vstack(self._parts, format="csr"))

    def discard(self) -> None:
        """The submission is there; this is not needed any more."""
        self.path.unlink()
