"""What outlives a process that writes a file: whose file it is, and which blocks are durable.

:class:`Lock` dies with its process, :class:`Journal` does not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.atomic import write_atomically
from featcache.disk import explained
from featcache.errors import InputError

_SHOWN = 32  # characters of a value in a message
_HOLDER_BYTES = 300  # at most, of a process and its host


class Lock:
    """The right to write `target`, held through a POSIX record lock on the file `path`.

    The kernel frees such a lock when its process ends, however it ends, and
    forked children do not inherit it. Two traits need care: it does not exclude
    a second holder in the same process, and closing *any* handle of the file in
    the process frees it. So the process looks among its own open handles before
    it opens the file.

    Parameters
    ----------
    path, target : Path
    wait : bool
        Wait until it is free, instead of raising.

    Raises
    ------
    InputError
        If another writer has it (named by process and host), or the file cannot be locked.
    """

    def __init__(self, path: Path, target: Path, wait: bool = False) -> None:
        self.path = path
        self._how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        if _is_open_here(path):
            raise InputError(
                f"{target}: this process (number {os.getpid()}) is writing it already; "
                "close that writer first"
            )
        try:
            self._handle = self._acquire(target)
        except OSError as error:
            told = explained(error, path, _HOLDER_BYTES)
            if isinstance(told, InputError):
                raise told from None
            raise InputError(
                f"{path}: cannot be locked ({error.strerror}); choose a folder that can be "
                "written to, on a file system with POSIX locks"
            ) from None

    def _acquire(self, target: Path) -> int:
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(handle, self._how)
            except OSError as error:
                holder = os.pread(handle, _HOLDER_BYTES, 0).decode("utf-8", "replace").split()
                os.close(handle)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                who = " on ".join(holder) or "unknown"
                raise InputError(
                    f"{target}: is being written by another process ({who}); "
                    "wait for it or choose another --out"
                ) from None
            # A holder that has finished may have removed the file after we opened it.
            if _is_at(handle, self.path):
                try:
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
                except OSError:  # a full disk; not even an empty file should be left
                    self.path.unlink(missing_ok=True)
                    os.close(handle)
                    raise
                return handle
            os.close(handle)

    def release(self) -> None:
        """Let the next one in; the lock file goes first, while nobody else can hold it."""
        if self._handle >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _is_open_here(path: Path) -> bool:
    """Whether this very process holds the lock file (a forked child's copy does not count)."""
    if not path.exists() or not os.path.isdir("/dev/fd"):
        return False
    for name in os.listdir("/dev/fd"):
        handle = int(name)
        try:
            if _is_at(handle, path):
                return os.pread(handle, _HOLDER_BYTES, 0).split()[:1] == [str(os.getpid()).encode()]
        except OSError:  # the handle of the listing itself, closed by now
            continue
    return False


@dataclass(frozen=True)
class Block:
    """Rows [start, stop), durable, with the hash of their bytes; `bad` = (row, reason).

    `at` is the first of their rows in the file, which may hold a share of all rows.
    """

    start: int
    stop: int
    at: int
    sha256: str
    bad: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Skeleton:
    """A file without its features: where they lie, and the hash of the bytes around them."""

    offset: int
    nbytes: int
    size: int
    sha256: str


class Journal:
    """An append-only file of JSON lines; a line counts once it is whole and synced.

    Attributes
    ----------
    fingerprint : dict
        What the blocks were made from and how.
    skeletons : list of Skeleton
        Of every file that held the blocks, the last one last.
    blocks : dict of Block by start
        The last record of each.
    """

    def __init__(self, path: Path, frozen: bool = False) -> None:
        """Open an existing journal; whatever follows its last whole line is cut off.

        That of another process, which may be at work, is `frozen`: read and left as it is.
        """
        self.path = path
        self.fingerprint: dict[str, Any] = {}
        self.skeletons: list[Skeleton] = []
        self.blocks: dict[int, Block] = {}
        self._size = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not self._take(line):
                    break
                self._size += len(line)
        self._handle = -1
        if frozen:
            return
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        if os.fstat(self._handle).st_size > self._size:
            os.ftruncate(self._handle, self._size)

    @classmethod
    def begin(cls, path: Path, fingerprint: Mapping[str, Any], skeleton: Skeleton) -> Journal:
        """Make a new journal in one step: it is there with both facts, or not at all."""
        records = ({"fingerprint": fingerprint}, {"skeleton": asdict(skeleton)})
        write_atomically(path, b"".join(_line(record) for record in records))
        return cls(path)

    def sorted_blocks(self) -> list[Block]:
        """The blocks in the order of their rows."""
        return [self.blocks[start] for start in sorted(self.blocks)]

    def _take(self, line: bytes) -> bool:
        """Read a line; False if it is damaged."""
        try:
            ((kind, value),) = json.loads(line).items()
            if kind == "fingerprint":
                self.fingerprint = dict(value)
            elif kind == "skeleton":
                self.skeletons.append(Skeleton(**value))
            else:
                bad = tuple((int(row), str(reason)) for row, reason in value.pop("bad"))
                block = Block(**value, bad=bad)
                self.blocks[block.start] = block
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        return True

    def add(self, record: Block | Skeleton) -> None:
        """Append a record; once this returns it outlives the process and the machine.

        On an error (say, a full disk) the journal is as before.
        """
        kind = "block" if isinstance(record, Block) else "skeleton"
        line = _line({kind: asdict(record)})
        try:
            if os.write(self._handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._handle)
        except OSError:
            # Opening cuts a torn line off too, so a failure here loses nothing.
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)
            raise
        self._size += len(line)
        if isinstance(record, Block):
            self.blocks[record.start] = record
        else:
            self.skeletons.append(record)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def difference(
    begun: Mapping[str, Any],
    now: Mapping[str, Any],
    titles: tuple[str, str] = ("begun with", "now"),
) -> str:
    """A table of the values that are not the same in two nested dicts, long ones shortened."""
    old, new = _flat(begun), _flat(now)
    left, right = _shortened(*titles)
    lines = [f"  {'':24} {left:{_SHOWN}}  {right}"]
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key, "(absent)"), new.get(key, "(absent)")
        if left != right:
            left, right = _shortened(left, right)
            lines.append(f"  {key:24} {left:{_SHOWN}}  {right}")
    return "\n".join(lines)


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested dicts as one, with dotted names; other values as JSON (texts as they are)."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, item in value.items():
            found |= _flat(item, f"{name}.{key}" if name else str(key))
        return found
    return {name: value if isinstance(value, str) else json.dumps(value)}


def _shortened(left: str, right: str) -> tuple[str, str]:
    """Both texts cut to a column, from shortly before they first differ."""
    same = next((i for i in range(len(left)) if left[i] != right[i : i + 1]), len(left))
    begin = max(0, same - 8) if max(len(left), len(right)) > _SHOWN else 0

    def cut(text: str) -> str:
        shown = ("..." if begin else "") + text[begin:]
        return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."

    return cut(left), cut(right)
