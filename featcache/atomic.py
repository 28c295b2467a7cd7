"""Files that appear under their final name whole or not at all."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from featcache.disk import explained, sync


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was.

    Raises
    ------
    InputError
        If the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
            # mkstemp makes files for the owner alone; a result has the usual permissions.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            sync(temporary)
            os.replace(temporary, target)
        except OSError as error:
            raise explained(error, target, 0) from error
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync(target.parent)


def clear_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete the temporary files of processes that were killed while they replaced ``path``.

    Only for one who holds a lock that keeps others from writing it now.
    """
    target = Path(path)
    for temporary in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}"):
        temporary.unlink()


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a whole file or leave what was there."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
