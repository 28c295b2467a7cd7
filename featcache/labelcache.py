"""Need large label files be read again?  Their compact form is kept under the files' hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.annotations import Labels, Unlisted, labels_of
from featcache.atomic import replacing
from featcache.disk import hash_ranges
from featcache.entries import Entries
from featcache.errors import InputError

FORMAT = 2  # part of the key: another layout, or other checks, make another file
LEAST_BYTES = 2**24  # smaller files are read in a second or two


def read_labels_cached(
    paths: Sequence[str | os.PathLike[str]],
    classes: str | os.PathLike[str] | None = None,
    descriptions: str | os.PathLike[str] | None = None,
    unlisted: Unlisted = "negative",
    folder: str | os.PathLike[str] | None = None,
) -> Labels:
    """As :func:`featcache.annotations.read_labels`; large files are parsed once.

    Parameters
    ----------
    paths, classes, descriptions, unlisted
        As there. The class list is applied afterwards: any list goes with what is kept.
    folder : path, optional
        Where the compact form is kept; by default ``featcache`` in ``$XDG_CACHE_HOME`` or
        ``~/.cache``.

    Notes
    -----
    A kept file is named by the SHA-256 of all bytes of the label files in their order, so a
    changed file is read anew. A damaged one is made again. Where nothing can be kept, that
    is said and no error.
    """
    return labels_of(_entries(list(paths), folder), classes, descriptions, unlisted)


def default_folder() -> Path:
    """``featcache`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "featcache"


def _entries(paths: list[str | os.PathLike[str]], folder: str | os.PathLike[str] | None) -> Entries:
    if not all(map(os.path.isfile, paths)) or sum(map(os.path.getsize, paths)) < LEAST_BYTES:
        return Entries.read(paths)  # which says what is missing
    target = (Path(folder) if folder else default_folder()) / f"labels-{_key(paths)}.npz"
    kept = Entries.unpack(target) if target.is_file() else None
    if kept is not None:
        return kept
    entries = Entries.read(paths)
    if entries.doubtful:  # which is refused with file and line, unless a list of classes has it
        return entries
    try:
        with replacing(target) as temporary, open(temporary, "wb") as file:
            arrays: dict[str, Any] = {**entries.pack()}
            np.savez(file, **arrays)
    except (OSError, InputError) as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        print(f"{target}: labels cannot be kept, so they are read again next time ({reason})")
    return entries


def _key(paths: list[str | os.PathLike[str]]) -> str:
    digest = hashlib.sha256(str(FORMAT).encode())
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            digest.update(hash_ranges(handle, (0, os.fstat(handle).st_size)).encode())
        finally:
            os.close(handle)
    return digest.hexdigest()
