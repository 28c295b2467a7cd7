"""Where do blocks of features wait until all of them are there?

In ``x.h5.partial``, an HDF5 file with everything but the features and room for
those, and ``x.h5.journal``, one line for each block that is durable. HDF5 makes
the file and is closed again; from then on blocks go straight to their place:
data, fsync, journal line, fsync. A later run trusts nothing that it has not hashed.
Of several processes each has a pair of its own (see :mod:`featcache.shares`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featcache import layout
from featcache.contents import CacheContents
from featcache.disk import (
    explained,
    hash_ranges,
    read_ranges,
    reserve,
    sync,
    try_size,
    write_at,
)
from featcache.journal import Block, Journal, Skeleton
from featcache.shares import Grid, Share

_FINISHING_BYTES = 2**20  # HDF5's own needs for a dozen small datasets, with much to spare


class Partial:
    """The unfinished file of a run; made by :func:`begin` or :func:`resume`.

    Attributes
    ----------
    path : Path
    journal : Journal
    grid : Grid
        All blocks that the file has room for, done or not.
    messages : list of str
        What was found damaged.
    """

    def __init__(
        self,
        path: Path,
        contents: CacheContents,
        grid: Grid,
        journal: Journal,
        skeleton: Skeleton,
    ) -> None:
        self.path = path
        self.journal = journal
        self.grid = grid
        self.messages: list[str] = []
        self._contents = contents
        self._skeleton = skeleton
        self._handle = os.open(path, os.O_RDWR)

    def pending(self) -> list[tuple[int, int]]:
        """Blocks with room here that are not durable here yet, in order."""
        done = self.journal.blocks
        return [item for item in self.grid.stop_of.items() if item[0] not in done]

    def store(self, start: int, rows: np.ndarray, bad: tuple[tuple[int, str], ...]) -> None:
        """Write float16 `rows` from row `start`; durable on return.

        Raises
        ------
        InputError
            If the disk is full; names the bytes needed and free.
        """
        if self._handle < 0:
            raise ValueError(f"{self.path}: is closed; make a new writer")
        data = rows.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(data).hexdigest()
        block = Block(start, start + len(rows), self.grid.at[start], digest, bad)
        try:
            write_at(self._handle, data, self._bytes(block)[0])
            os.fsync(self._handle)
            self.journal.add(block)
        except OSError as error:
            left = sum(stop - start for start, stop in self.pending())
            raise explained(error, self.path, left * rows[0].nbytes) from None

    def drop_bad_blocks(self) -> list[Block]:
        """Hash all blocks; those whose bytes are not what was written are pending again."""
        blocks = self.journal.sorted_blocks()
        bad = [block for block in blocks if not self._is_good(block)]
        for block in bad:
            del self.journal.blocks[block.start]
            self.messages.append(
                f"{self.path}: rows {block.start} to {block.stop - 1} are not what was "
                "written there; they are made again"
            )
        return bad

    def take(self, path: Path, journal: Journal) -> list[Block]:
        """Copy the blocks of another process that are not here yet.

        Returns
        -------
        bad : list of Block
            Those whose bytes are no longer what was written; they are not copied.
        """
        bad = []
        handle = os.open(path, os.O_RDONLY)
        try:
            for block in journal.sorted_blocks():
                if block.start in self.journal.blocks:
                    continue
                data = _sound_bytes(block, self._contents, journal.skeletons, handle)
                if data is None:
                    bad.append(block)
                    continue
                rows = np.frombuffer(data, layout.FEATURE_DTYPE)
                shape = (block.stop - block.start, *self._contents.shape[1:])
                self.store(block.start, rows.reshape(shape), block.bad)
        finally:
            os.close(handle)
        return bad

    def complete(self, target: Path, provenance: Mapping[str, Any]) -> None:
        """Add what a finished cache has, and move the file to `target`."""
        blocks = self.journal.sorted_blocks()
        bad = {row: reason for block in blocks for row, reason in block.bad}
        text = self._contents.ids.dtype.itemsize + 4 * layout.REASON_LENGTH
        room = len(self._contents.ids) + len(bad) * text + len(blocks) * 80 + _FINISHING_BYTES
        reserve(self._handle, self.path, self._skeleton.size, room)
        self._close_data()
        hashes = [(block.start, block.sha256) for block in blocks]
        layout.complete(self.path, self._contents, bad, hashes, provenance)
        sync(self.path)
        os.replace(self.path, target)
        sync(target.parent)

    def close(self) -> None:
        """Let go of the files, which stay."""
        self._close_data()
        self.journal.close()

    def _close_data(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _bytes(self, block: Block) -> tuple[int, int]:
        return _extent(self._contents, self._skeleton.offset, block)

    def _is_good(self, block: Block) -> bool:
        return hash_ranges(self._handle, self._bytes(block)) == block.sha256


def begin(
    target: Path,
    contents: CacheContents,
    block_rows: int,
    fingerprint: Mapping[str, Any],
    share: Share,
) -> Partial:
    """Begin anew; whatever this process had left is deleted."""
    share.discard(target)
    path = share.beside(target, ".partial")
    grid = share.grid(len(contents.ids), block_rows)
    skeleton = _build(path, contents, grid.rows)
    sync(path.parent)
    try:
        journal = Journal.begin(share.beside(target, ".journal"), fingerprint, skeleton)
    except OSError as error:
        raise explained(error, path, _FINISHING_BYTES) from None
    return Partial(path, contents, grid, journal, skeleton)


def resume(
    target: Path, contents: CacheContents, block_rows: int, journal: Journal, share: Share
) -> Partial:
    """Go on where the run of `journal` stopped, once every block of it is hashed."""
    path = share.beside(target, ".partial")
    grid = share.grid(len(contents.ids), block_rows)
    for block in journal.sorted_blocks():
        if (grid.stop_of.get(block.start), grid.at.get(block.start)) != (block.stop, block.at):
            del journal.blocks[block.start]
    messages = []
    skeleton = _intact_skeleton(path, journal)
    if skeleton is None:
        new = share.beside(target, ".partial.new")
        skeleton, saved = _rebuild(path, new, contents, grid.rows, journal)
        messages.append(
            f"{path}: gone, cut short or left while finishing; "
            f"{saved} of {len(journal.blocks)} blocks could be saved"
        )
    partial = Partial(path, contents, grid, journal, skeleton)
    partial.drop_bad_blocks()
    partial.messages[:0] = messages
    return partial


def sound_blocks(
    path: Path, contents: CacheContents, journal: Journal, grid: Grid
) -> dict[int, int]:
    """Blocks for which `grid` is asked and that another process has, hashed: stop by start."""
    wanted = [
        block
        for block in journal.sorted_blocks()
        if block.start in grid.mine and grid.stop_of[block.start] == block.stop
    ]
    if not wanted or not path.is_file():
        return {}
    handle = os.open(path, os.O_RDONLY)
    try:
        return {
            block.start: block.stop
            for block in wanted
            if _sound_bytes(block, contents, journal.skeletons, handle) is not None
        }
    finally:
        os.close(handle)


def _extent(contents: CacheContents, offset: int, block: Block) -> tuple[int, int]:
    """(first byte, number of bytes) of a block in a file with features at `offset`."""
    _, v, d = contents.shape
    row_bytes = v * d * layout.FEATURE_DTYPE.itemsize
    return offset + block.at * row_bytes, (block.stop - block.start) * row_bytes


def _build(path: Path, contents: CacheContents, rows: int) -> Skeleton:
    """A new file with everything but the features, synced, with room for `rows` of them."""
    _, v, d = contents.shape
    nbytes = rows * v * d * layout.FEATURE_DTYPE.itemsize
    others = sum(value.nbytes for value in contents.arrays().values()) + _FINISHING_BYTES
    try:
        try_size(path, nbytes + others, others)
        offset = layout.create(path, contents, rows)
        handle = os.open(path, os.O_RDWR)
        try:
            size = os.fstat(handle).st_size
            reserve(handle, path, offset, nbytes + _FINISHING_BYTES)
            os.fsync(handle)
            return Skeleton(offset, nbytes, size, _hash_around(handle, offset, nbytes, size))
        finally:
            os.close(handle)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _intact_skeleton(path: Path, journal: Journal) -> Skeleton | None:
    """How the file lies, unless it is gone, cut short or HDF5 has begun to complete it."""
    if not path.is_file():
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        for known in reversed(journal.skeletons):
            # Bytes past the known size belong to nothing that the rest refers to.
            if os.fstat(handle).st_size < known.size:
                continue
            if known.sha256 == _hash_around(handle, known.offset, known.nbytes, known.size):
                return known
    finally:
        os.close(handle)
    return None


def _hash_around(handle: int, offset: int, nbytes: int, size: int) -> str:
    """Hash of all bytes of a file of `size` but those of the features."""
    stop = offset + nbytes
    return hash_ranges(handle, (0, offset), (stop, size - stop))


def _rebuild(
    path: Path, new: Path, contents: CacheContents, rows: int, journal: Journal
) -> tuple[Skeleton, int]:
    """Replace a damaged file by a sound one; also the number of blocks that were saved."""
    skeleton = _build(new, contents, rows)
    saved = 0
    if path.is_file():
        source, sink = os.open(path, os.O_RDONLY), os.open(new, os.O_RDWR)
        try:
            for block in journal.sorted_blocks():
                data = _sound_bytes(block, contents, journal.skeletons, source)
                if data is not None:
                    write_at(sink, memoryview(data), _extent(contents, skeleton.offset, block)[0])
                    saved += 1
            os.fsync(sink)
        except OSError as error:
            raise explained(error, new, skeleton.nbytes) from None
        finally:
            os.close(source)
            os.close(sink)
    # The journal first: it then knows whichever of the two files it is found with.
    journal.add(skeleton)
    os.replace(new, path)
    sync(path.parent)
    return skeleton, saved


def _sound_bytes(
    block: Block, contents: CacheContents, skeletons: list[Skeleton], handle: int
) -> bytes | None:
    """The bytes of a block, if they are right where one of `skeletons` has them."""
    for offset in dict.fromkeys(known.offset for known in reversed(skeletons)):
        data = b"".join(read_ranges(handle, _extent(contents, offset, block)))
        if hashlib.sha256(data).hexdigest() == block.sha256:
            return data
    return None
