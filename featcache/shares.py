"""Which rows are whose when several processes write one cache, and which files do they keep?

The blocks of rows are dealt out in turn: process `rank` of `world` makes blocks
rank, rank + world, rank + 2 world, ... and keeps them in files of its own, so that
none needs another to be alive. The file of rank 0 has room for all rows; the last
process to finish copies the blocks of the others into it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import InputError

FILES = (".journal", ".partial.new", ".partial")  # the journal first, as it refers to the rest


@dataclass(frozen=True)
class Share:
    """What one of `world` processes that write a cache together has to do.

    Attributes
    ----------
    rank, world : int
        This process, from 0, and how many there are.
    """

    rank: int = 0
    world: int = 1

    def beside(self, target: Path, suffix: str) -> Path:
        """The file of this process that belongs to `target`."""
        own = f".rank{self.rank}of{self.world}" if self.rank else ""
        return target.with_name(target.name + own + suffix)

    def grid(self, n: int, block_rows: int) -> Grid:
        """The blocks of `n` rows as this process sees them."""
        every = [(start, min(n, start + block_rows)) for start in range(0, n, block_rows)]
        mine = every[self.rank :: self.world]
        return Grid(mine if self.rank else every, frozenset(start for start, _ in mine))

    def discard(self, target: Path) -> None:
        """Delete what this process has left of `target`."""
        for suffix in FILES:
            self.beside(target, suffix).unlink(missing_ok=True)


class Grid:
    """Blocks of rows, and where they lie in the file of a process.

    Attributes
    ----------
    stop_of, at : dict
        Last row + 1, and first row in the file, by first row; of all blocks that the file has
        room for.
    mine : frozenset of int
        First rows of the blocks that the process makes.
    rows : int
        Rows in the file.
    """

    def __init__(self, held: list[tuple[int, int]], mine: frozenset[int]) -> None:
        self.stop_of = dict(held)
        self.mine = mine
        self.at: dict[int, int] = {}
        self.rows = 0
        for start, stop in held:
            self.at[start] = self.rows
            self.rows += stop - start


def shares_of(target: Path) -> list[Share]:
    """The processes that have left files of `target`, rank 0 first."""
    name = re.escape(target.name)
    pattern = re.compile(rf"{name}(?:\.rank(\d+)of(\d+))?\.(?:journal|partial|lock)")
    found = set()
    for entry in os.listdir(target.parent):
        match = pattern.fullmatch(entry)
        if match:
            rank, world = match.groups()
            found.add(Share(int(rank), int(world)) if rank else Share())
    return sorted(found, key=lambda share: (share.rank, share.world))


def share_from(environment: Mapping[str, str]) -> Share:
    """The share that `torchrun` assigns by RANK and WORLD_SIZE; all, where it does not.

    Raises
    ------
    InputError
        If they are not two numbers, the first below the second.
    """
    rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(
            f"RANK={rank} WORLD_SIZE={world} in the environment: expected 0 <= RANK < WORLD_SIZE, "
            "as torchrun sets them"
        )
    return Share(int(rank), int(world))
