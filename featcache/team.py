"""Who else writes this cache, is at work now, and has done what?

All that processes know of each other is in files and locks: none has to be started
with the others, and one that dies holds nobody up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from featcache.errors import InputError
from featcache.journal import Journal, Lock
from featcache.shares import Share, shares_of


class Team:
    """The processes that write `target`, as one of them, with that share of the rows, sees them.

    Attributes
    ----------
    own : Share
        Whose files are ours; rank 0 has the same ones whatever the number of processes.
    """

    def __init__(self, target: Path, share: Share) -> None:
        self.target = target
        self.own = share if share.rank else Share()

    def gate(self) -> Lock:
        """Whoever begins or finishes holds it for a moment; the others wait."""
        return Lock(Share().beside(self.target, ".gate"), self.target, wait=True)

    def lock(self, share: Share) -> Lock:
        """The right to touch the files of a share; raises if its process is at work."""
        return Lock(share.beside(self.target, ".lock"), self.target)

    def others(self) -> list[Share]:
        """Whoever else has left files."""
        return [share for share in shares_of(self.target) if share != self.own]

    def journals(self, shares: list[Share]) -> Iterator[tuple[Share, Journal]]:
        """Those of `shares` that have begun, as they stand."""
        for share in shares:
            # A process that finishes takes the files away.
            with contextlib.suppress(FileNotFoundError):
                yield share, Journal(share.beside(self.target, ".journal"), frozen=True)

    def lock_others(self, held: contextlib.ExitStack) -> bool:
        """Whether nobody else is at work; then all files are ours while `held` is open."""
        for share in {Share(), *self.others()} - {self.own}:
            try:
                held.enter_context(self.lock(share))
            except InputError:
                held.close()
                return False
        return True

    def give_up(self, share: Share) -> None:
        """Delete what another run has left; refused while it is at work."""
        with contextlib.nullcontext() if share == self.own else self.lock(share):
            share.discard(self.target)
