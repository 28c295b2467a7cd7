"""What is there already where a cache is to be: nothing, another one, our own, or half of it?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache import layout
from featcache.errors import InputError
from featcache.shares import Share, shares_of
from featcache.team import Team


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Before anything that takes long: is there a file, or a folder, where the cache is to be?

    Raises
    ------
    InputError
        Saying how to go on.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file, such as NAME.h5")
    if path.exists() and not overwrite:
        raise InputError(
            f"{path}: exists already; pass --overwrite (overwrite=True) to replace it, "
            "or choose another --out"
        )


def is_at_rest(path: str | os.PathLike[str]) -> bool:
    """Whether nobody has anything unfinished at `path`; a finished cache may be there."""
    target = Path(path)
    return not (target.parent.is_dir() and shares_of(target))


def recorded_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fingerprint with which an unfinished run at `path` was begun; empty if there is none."""
    target = Path(path)
    if target.parent.is_dir():
        for _, journal in Team(target, Share()).journals(shares_of(target)):
            return dict(journal.fingerprint.get("run", {}))
    return {}


def digest(fingerprint: Mapping[str, Any]) -> str:
    """What a finished cache keeps of the fingerprint of its run."""
    text = json.dumps(fingerprint, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_outcome(target: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether the target is a cache that was made with these settings."""
    try:
        return layout.read(target).provenance.get("fingerprint") == digest(fingerprint)
    except InputError:
        return False


def was_renamed(team: Team, fingerprint: Mapping[str, Any]) -> bool:
    """Whether the target is the outcome of just this run, which was killed before its last step."""
    target = team.target
    if Share().beside(target, ".partial").exists() or not is_outcome(target, fingerprint):
        return False
    blocks = layout.read(target).blocks()
    for _, journal in team.journals([Share()]):
        if journal.fingerprint == fingerprint:
            return [(block.start, block.sha256) for block in journal.sorted_blocks()] == blocks
    return False
