"""Files that appear under their final name whole or not at all."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from featcache.disk import explained, sync
from featcache.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was.

    Raises
    ------
    InputError
        If the disk is full, or no file can be made or replaced there.
    """
    target = Path(path)
    with _told(target):
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
        except OSError as error:
            raise explained(error, target, 0) from error
        with _told(target):
            os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync(target.parent)


@contextmanager
def _told(path: str | os.PathLike[str]) -> Iterator[None]:
    """The system names a temporary file, or none; a user knows the one that was asked for."""
    try:
        yield
    except OSError as error:
        full = explained(error, Path(path), 0)
        if isinstance(full, InputError):
            raise full from error
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another --out"
        ) from error


def refuse_unwritable(path: str | os.PathLike[str]) -> None:
    """Before anything that takes long: can there be a file of that name?  Leaves nothing behind.

    Raises
    ------
    InputError
        If it is a folder, or its folder cannot be made or takes no files.
    """
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; give the name of a file")
    _try(Path(path).parent, path)


def refuse_unwritable_folder(path: str | os.PathLike[str]) -> None:
    """The same of a folder that is to hold files.

    Raises
    ------
    InputError
        If it is a file, cannot be made or takes no files.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{path}: is a file; give --out the name of a folder")
    _try(Path(path), path)


def _try(folder: Path, path: str | os.PathLike[str]) -> None:
    """Make a file without a name in the folder, or in the nearest one above it that is there."""
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise InputError(f"{path}: cannot be written ({place} is no folder); choose another --out")
    # Permissions alone do not tell of disks that are mounted to be read only.
    with _told(path), tempfile.TemporaryFile(dir=place):
        pass


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
