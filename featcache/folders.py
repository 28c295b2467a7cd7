"""Which files lie in a folder and below it?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator


def walk(
    root: str | os.PathLike[str], onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each folder with the names of its files; also where links lead to, each once.

    A folder is found under its own name if it has one below `root`, else under that of the
    first link. Links may go round in circles.

    Parameters
    ----------
    root : path
    onerror : function of an OSError, optional
        Called of a folder that cannot be listed, which is left out otherwise.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(root)]
    for start in waiting:  # grows meanwhile
        for folder, folders, names in os.walk(start, onerror=onerror):
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in seen:
                folders.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            folders.sort()
            below = [os.path.join(folder, name) for name in folders]
            waiting += filter(os.path.islink, below)
            yield folder, names
