"""How are the rows of finished caches read to make another cache of them?

Every block is hashed as it is read, and what was hashed is what is handed on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from featcache import layout
from featcache.disk import read_ranges
from featcache.errors import InputError
from featcache.layout import CacheFile


def refuse_damaged(files: Sequence[CacheFile]) -> None:
    """Refuse a file that is damaged outside its features, whose blocks are hashed as they come.

    Raises
    ------
    InputError
        Naming the file and the parts.
    """
    for file in files:
        if file.damaged():
            raise InputError(
                f"{file.path}: damaged in {', '.join(file.damaged())}; copy it or extract it again"
            )


def blocks_of(
    files: Sequence[CacheFile], block_rows: int
) -> Iterator[tuple[int, np.ndarray, list[str | None]]]:
    """(first row, features, reasons) of `block_rows` rows each, over all files.

    Raises
    ------
    InputError
        If a block is not what was written.
    """
    start, rows, reasons = 0, files[0].features[:0], list[str | None]()
    for file in files:
        for piece, whys in _hashed_blocks(file):
            rows, reasons = np.concatenate([rows, piece]), reasons + whys
            while len(rows) >= block_rows:
                yield start, rows[:block_rows], reasons[:block_rows]
                start += block_rows
                rows, reasons = rows[block_rows:], reasons[block_rows:]
    if len(rows):
        yield start, rows, reasons


def _hashed_blocks(file: CacheFile) -> Iterator[tuple[np.ndarray, list[str | None]]]:
    n, v, d = file.features.shape
    row_bytes = v * d * layout.FEATURE_DTYPE.itemsize
    blocks = file.blocks()
    stops = [*(start for start, _ in blocks[1:]), n]
    with open(file.path, "rb") as raw:
        at = 0
        for (start, digest), stop in zip(blocks, stops, strict=True):
            extent = (file.offset + start * row_bytes, (stop - start) * row_bytes)
            data = b"".join(read_ranges(raw.fileno(), extent)) if at == start < stop else b""
            if hashlib.sha256(data).hexdigest() != digest:
                raise InputError(
                    f"{file.path}: rows {start} to {stop - 1} are not what was written; "
                    "copy it or extract it again"
                )
            rows = np.frombuffer(data, layout.FEATURE_DTYPE).reshape(stop - start, v, d)
            yield rows, [file.reasons.get(row) for row in range(start, stop)]
            at = stop
