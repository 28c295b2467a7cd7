"""How is every head of a folder fitted again, by the same recipe, on new caches?

A network that was trained again has other features, hence another id, so a new cache is known by
its place: by the name of its file and, if there are several, by the name of its folder, as they
were when the head was fitted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from featcache import CacheSet, FeatureCache
from featcache.atomic import refuse_unwritable_folder
from featcache.console import option, required
from heads.adapting import AdaptConfig
from heads.catalogue import Entry, list_entries, read_entry
from heads.fitting import FitConfig
from heads.recipes import differences, parse_command
from heads.sweep import (
    Outcome,
    Sweep,
    Workers,
    changed_input,
    in_the_way,
    make_all,
)


@dataclass(frozen=True)
class RefitConfig(Workers):
    """Which heads are fitted on what; every field is an option of ``heads refit``."""

    folder: str
    caches: list[str] = required(
        "new caches: folders with all that is below them, or files", nargs="+", metavar="NEW"
    )
    out: str = option("", "folder of the new heads (default: DIR, with --overwrite)", metavar="DIR")
    overwrite: bool = option(False, "without --out: replace the heads of DIR")


@dataclass(frozen=True)
class Refit:
    """Heads that were fitted again, and names of files that were left as they are."""

    sweep: Sweep
    left: list[str]


def refit(config: RefitConfig) -> Refit:
    """Fit heads again; whose network has no new cache, and what was not fitted, is left as it is.

    It can be stopped and goes on: a head that is there, of the new cache, is not made again.

    Raises
    ------
    ValueError
        If nothing can be fitted again; before anything is made.
    """
    if not os.path.exists(config.folder):
        raise ValueError(f"{config.folder}: no such folder; give one that holds heads")
    if not config.out and not config.overwrite:
        raise ValueError(
            f"{config.folder}: its heads would be replaced; pass --overwrite or give --out DIR"
        )
    refuse_unwritable_folder(config.out or config.folder)
    listing = list_entries([config.folder], sort="name")
    new = list(CacheSet(config.caches).caches)
    fits: list[FitConfig | AdaptConfig] = []
    left, failed = [], []
    for entry in listing.entries:
        try:
            one = _renewed(entry, new, config)
        except ValueError as error:
            failed.append(Outcome(entry.path.name, error=str(error)))
            continue
        if one is None:
            left.append(entry.path.name)
        else:
            fits.append(one)
    failed += [Outcome(Path(text.split(":")[0]).name, error=text) for text in listing.unreadable]
    if not fits and not failed:
        raise ValueError(
            f"{config.folder}: none of its heads was fitted on a cache called like one of "
            f"{' '.join(config.caches)}; new caches must have the names of the old ones"
        )
    present, waiting = [], []
    for one in fits:
        name = Path(one.out).name
        if not os.path.exists(one.out):
            waiting.append(one)
        elif _is_of(one):
            present.append(name)
        elif not config.out:
            waiting.append(replace(one, overwrite=True))
        elif isinstance(one, FitConfig):
            failed.append(Outcome(name, error=in_the_way(one) or "is there, of another cache"))
        else:
            failed.append(Outcome(name, error="is there, of another cache or recipe"))
    done = make_all(waiting, present, failed, config.out or config.folder, config)
    return Refit(done, left)


def _renewed(
    entry: Entry, new: Sequence[FeatureCache], config: RefitConfig
) -> FitConfig | AdaptConfig | None:
    """How the head is to be fitted on its new cache; None if there is none, or it was not fitted.

    So are blends and the heads that adapted models have made for one domain.
    """
    if entry.kind in ("blend", "domain head"):
        return None
    kind, verb = (AdaptConfig, "adapt") if entry.kind == "adapted" else (FitConfig, "fit")
    made: FitConfig | AdaptConfig = parse_command(entry.command, verb, kind)
    cache = _called(made.cache, new)
    if cache is None:
        return None
    source = ""
    if made.source:
        found = _called(made.source, [other for other in new if other is not cache])
        if found is None:
            raise ValueError(
                f"was fitted with {made.source}, of which there is no new one; give a cache "
                f"called {Path(made.source).name} in a folder {Path(made.source).parent.name}"
            )
        source = str(found.path)
    out = str(Path(config.out or config.folder) / entry.path.name)
    return replace(made, cache=str(cache.path), source=source, out=out, overwrite=False)


def _called(old: str, new: Sequence[FeatureCache]) -> FeatureCache | None:
    """The new cache of that file name, and of that folder's name if there are several."""
    named = [cache for cache in new if cache.path.name == Path(old).name]
    folder = Path(old).parent.name
    in_folder = [cache for cache in named if cache.path.absolute().parent.name == folder]
    if len(named) > 1 and len(in_folder) != 1:
        raise ValueError(
            f"was fitted on {old}, which may now be {' or '.join(str(c.path) for c in named)}; "
            f"give only one, or keep it in a folder {folder}"
        )
    return next(iter(in_folder or named), None)


def _is_of(wanted: FitConfig | AdaptConfig) -> bool:
    """Whether the head that is there is of that recipe and those very files, as they are now.

    Of heads that were made before hashes of caches were kept nobody knows.
    """
    entry = read_entry(wanted.out)
    told, verb = entry.provenance, "fit" if isinstance(wanted, FitConfig) else "adapt"
    try:
        made = parse_command(entry.command, verb, type(wanted))
    except ValueError:
        return False
    places = {"cache": wanted.cache, "source": wanted.source}
    same = all(
        Path(str(told.get(name, ""))).absolute() == Path(place).absolute()
        and told.get(f"{name}_hash") is not None
        for name, place in places.items()
        if place
    )
    return same and not differences(made, wanted) and not changed_input(wanted, entry)
