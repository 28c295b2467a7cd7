"""Are these the images that they were? Sizes of the files, or all of their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from featcache.images import ImageSet

_AHEAD = 256  # files that are read at a time; bounds the memory for what is waiting


def file_sizes(images: ImageSet) -> str:
    """How many files of how many bytes, and a hash over ordered ids and sizes."""
    digest, count, total = hashlib.sha256(), 0, 0
    for row, image_id in enumerate(images.ids):
        try:
            size = os.path.getsize(images.path(row))
            count, total = count + 1, total + size
        except OSError:
            size = -1
        digest.update(f"{image_id}\t{size}\n".encode())
    return f"{count:,} files of {total:,} bytes {digest.hexdigest()}"


def file_contents(
    images: ImageSet, threads: int, advance: Callable[[int], None] = lambda count: None
) -> str:
    """A hash over ordered ids and the bytes of their files; reads all, and says how many."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for rows in _runs(range(len(images)), _AHEAD):
            hashes = pool.map(_hash, [images.path(row) for row in rows])
            for image_id, found in zip(images.ids[rows.start : rows.stop], hashes, strict=True):
                digest.update(f"{image_id}\t{found}\n".encode())
            advance(len(rows))
    return digest.hexdigest()


def _runs(rows: range, length: int) -> Iterator[range]:
    return (rows[first : first + length] for first in range(0, len(rows), length))


def _hash(path: Path) -> str:
    """Hash of a file; empty where it cannot be read, as its row then says."""
    digest = hashlib.sha256()
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()
