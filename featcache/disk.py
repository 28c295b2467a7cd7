"""How do bytes get onto a disk for good, and how is it noticed when there is no room?"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from featcache.errors import InputError

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_NO_ALLOCATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_CHUNK = 2**22


def sync(path: Path) -> None:
    """Make the bytes of a file durable, or the names in a folder (new, renamed, removed files)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explained(error: OSError, path: Path, nbytes: int) -> Exception:
    """`error`, or if it says that there is no room: one line that says how much is needed."""
    if error.errno not in _NO_ROOM:
        return error
    free = shutil.disk_usage(path.parent).free
    return InputError(
        f"{path}: {nbytes:,} more bytes are needed, the disk has {free:,} free "
        f"({error.strerror}); make room or choose another --out, then run the same command again"
    )


def try_size(path: Path, nbytes: int, nbytes_now: int) -> None:
    """Fail at once if a file of `nbytes` is not allowed, or its first `nbytes_now` do not fit.

    Leaves an empty file. HDF5 cannot be relied on to close a file cleanly that
    it has no room for.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(handle, nbytes)
        reserve(handle, path, 0, nbytes_now)
        os.ftruncate(handle, 0)
    except OSError as error:
        raise explained(error, path, nbytes) from None
    finally:
        os.close(handle)


def reserve(handle: int, path: Path, offset: int, nbytes: int) -> None:
    """Take disk space now, so that a full disk shows before hours of work, not after.

    Where the file system cannot, compare with the free space.

    Raises
    ------
    InputError
        If there is no room; names the bytes needed and free.
    """
    allocate = getattr(os, "posix_fallocate", None)
    try:
        if allocate is not None:
            try:
                allocate(handle, offset, nbytes)
                return
            except OSError as error:
                if error.errno not in _NO_ALLOCATION:
                    raise
        if shutil.disk_usage(path.parent).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise explained(error, path, nbytes) from None


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at `offset`; not yet synced."""
    while len(data):
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def read_ranges(handle: int, *ranges: tuple[int, int]) -> Iterator[bytes]:
    """The bytes of (offset, nbytes) runs in pieces of a few MiB; ends early where the file does."""
    for offset, nbytes in ranges:
        stop = offset + nbytes
        while offset < stop and (piece := os.pread(handle, min(_CHUNK, stop - offset), offset)):
            yield piece
            offset += len(piece)


def hash_ranges(handle: int, *ranges: tuple[int, int]) -> str:
    """SHA-256 (hex) over (offset, nbytes) runs of a file; O(1) memory."""
    digest = hashlib.sha256()
    for piece in read_ranges(handle, *ranges):
        digest.update(piece)
    return digest.hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hash_ranges(file.fileno(), (0, os.fstat(file.fileno()).st_size))
