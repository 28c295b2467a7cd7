"""Are these the images that they were? Sizes of the files, or all of their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from featcache.errors import InputError
from featcache.images import ImageSet, refuse_trouble

ABSENT = -1  # in place of the size of a file that is not there

_AHEAD = 256  # files that are read at a time; bounds the memory for what is waiting


def file_sizes(images: ImageSet) -> np.ndarray:
    """(n,) int64: bytes of each file, :data:`ABSENT` where there is none."""
    rows = range(len(images))
    return np.fromiter((_size(images.path(row)) for row in rows), np.int64, len(images))


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return ABSENT


def told_sizes(images: ImageSet, sizes: np.ndarray) -> str:
    """How many files of how many bytes, and a hash over ordered ids and sizes."""
    digest = hashlib.sha256()
    for image_id, size in zip(images.ids, sizes, strict=True):
        digest.update(f"{image_id}\t{size}\n".encode())
    there = sizes[sizes != ABSENT]
    return f"{len(there):,} files of {there.sum():,} bytes {digest.hexdigest()}"


def refuse_changed(path: Path, size: int) -> None:
    """After an image was read: does its file still have the `size` of the beginning?

    Raises
    ------
    InputError
        If not: half of a file that is being copied would become a bad image for good.
    """
    now = _size(path)
    if now != size:
        was, has = (f"{n:,} bytes" if n != ABSENT else "none" for n in (size, now))
        raise InputError(
            f"{path}: changes while images are extracted ({was} at first, {has} now); put it back "
            "and run the same command again, or begin anew with --overwrite once nobody writes "
            "to the folder"
        )


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
    except OSError as error:
        refuse_trouble(path, error)  # else what may be read again by then would be another image
        return ""
    return digest.hexdigest()
