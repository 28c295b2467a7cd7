"""How are hundreds of heads made of one grid, side by side, and made only once?

Every head is a ``heads fit`` of its own, given out by joblib: to processes of this machine, or,
inside ``joblib.parallel_config("dask")``, to the workers of a cluster that see the same files::

    from distributed import Client
    from joblib import parallel_config

    with Client("tcp://scheduler:8786"), parallel_config("dask"):
        sweep(SweepConfig(["caches/stage_1"], grid="grid.toml", out="swept"))

Workers should have one thread each (``dask worker --nthreads 1``): a head uses several threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import joblib

from featcache import CacheSet, FeatureCache, layout
from featcache.atomic import refuse_unwritable_folder
from featcache.cacheset import short
from featcache.console import Interrupted, Progress, option, required
from featcache.disk import hash_file
from featcache.errors import MissingExtra
from heads.adapting import AdaptConfig, adapt
from heads.catalogue import Entry, read_entry
from heads.fitting import OF_SOURCE, FitConfig, fit
from heads.recipes import Recipe, cache_name, differences, parse_command, read_grid


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who makes the heads."""

    jobs: int | None = option(None, "heads at once, a process each (default: 1)")
    scheduler: str = option(
        "", "address of a dask scheduler, whose workers make the heads", metavar="ADDRESS"
    )


@dataclass(frozen=True)
class SweepConfig(Workers):
    """Which heads are made where; every field is an option of ``heads sweep``."""

    caches: list[str]
    grid: str = required("what to combine (see below)", metavar="GRID.toml")
    out: str = required("folder of the heads", metavar="DIR")
    source: str = option(
        "",
        "caches of the validation images, a folder or a file: every head is scored on them, too",
        metavar="DIR",
    )
    dry_run: bool = option(False, "print the names of the heads and whether they are there")


@dataclass(frozen=True)
class Outcome:
    """What became of one head: a score, or the error that kept it from being made."""

    name: str
    score: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Sweep:
    """Heads of a sweep: made now, made before, and the reasons why others could not be."""

    made: list[Outcome]
    present: list[str]
    failed: list[Outcome]


def sweep(config: SweepConfig) -> Sweep:
    """Make every head of the grid that is not there yet.

    A head that cannot be made does not stop the others. Killed at any moment, the same call goes
    on: heads appear whole or not at all, and a finished one is never made again.

    Raises
    ------
    ValueError
        If the grid or the caches are wrong, or `out` takes no files; before anything is made.
    Interrupted
        By Ctrl-C, saying how to go on.
    """
    refuse_unwritable_folder(config.out)
    fits = planned(config)
    return make_all(*_sorted_out(fits), config.out, config)


def make_all(
    waiting: Sequence[FitConfig | AdaptConfig],
    present: list[str],
    failed: list[Outcome],
    folder: str,
    workers: Workers,
) -> Sweep:
    """Make what waits, with progress; what is present or has failed before is told and counted."""
    total = len(waiting) + len(present) + len(failed)
    progress = Progress(total, "heads", done=len(present) + len(failed))
    for outcome in failed:
        progress.print(_line(outcome))
    made: list[Outcome] = []
    failed = list(failed)
    try:
        for outcome in _run(waiting, workers):
            (failed if outcome.error else made).append(outcome)
            progress.print(_line(outcome))
            progress.advance(1)
    except KeyboardInterrupt:
        raise Interrupted(
            f"{len(present) + len(made):,} of {total:,} heads are in {folder}; "
            "the same command goes on"
        ) from None
    finally:
        progress.clear()
    return Sweep(made, present, failed)


def _line(outcome: Outcome) -> str:
    if outcome.error:
        return f"failed  {outcome.name}: {outcome.error}"
    return f"{outcome.score:.4f}  {outcome.name}"


# -------------------------------------------------------------------------- plan


def planned(config: SweepConfig) -> list[FitConfig]:
    """A fit for every recipe and cache, ordered by cache.

    Raises
    ------
    ValueError
        Naming the file that is wrong.
    """
    recipes = read_grid(config.grid)
    caches = _labelled(config.caches)
    sources = _sources(config.source, caches) if config.source else {}
    for name in () if sources else OF_SOURCE:
        if any(getattr(r.config, name) != getattr(FitConfig, name) for r in recipes):
            raise ValueError(f"{config.grid}: {name} has no effect without --source")
    fits = [
        _placed(recipe, cache, sources.get(cache.path, ""), config.out)
        for cache in caches
        for recipe in recipes
        if recipe.fits(cache_name(cache.path))
    ]
    if not fits:
        raise ValueError(
            f"{config.grid}: its networks match none of the caches "
            f"{', '.join(cache_name(cache.path) for cache in caches)}"
        )
    return list({one.out: one for one in fits}.values())


def _placed(recipe: Recipe, cache: FeatureCache, source: str, out: str) -> FitConfig:
    one = recipe.config
    name = recipe.name(cache_name(cache.path), bool(source))
    return replace(one, cache=str(cache.path), source=source, out=str(Path(out) / f"{name}.h5"))


def _labelled(places: Sequence[str]) -> list[FeatureCache]:
    """The caches, which must have labels and different names."""
    caches = list(CacheSet(list(places), recursive=False))
    seen: dict[str, FeatureCache] = {}
    for cache in caches:
        if cache.labels is None:
            raise ValueError(f"{cache.path}: has no labels; heads are fitted on labelled caches")
        other = seen.setdefault(cache_name(cache.path), cache)
        if other is not cache:
            raise ValueError(
                f"{cache.path} and {other.path} have one name, by which heads are called; "
                "rename one, or sweep them into different folders"
            )
    return caches


def _sources(place: str, caches: Sequence[FeatureCache]) -> dict[Path, str]:
    """By the path of a cache, that of its network's validation images."""
    every = list(CacheSet(place, recursive=False))
    found = {}
    for cache in caches:
        own = [source for source in every if source.network_id == cache.network_id]
        if len(own) > 1:
            own = [source for source in own if source.path.name == cache.path.name]
        if len(own) != 1:
            raise ValueError(
                f"{place}: {'several caches' if own else 'has no cache'} of network "
                f"{short(cache.network_id)} of {cache.path}; give one of each network"
            )
        found[cache.path] = str(own[0].path)
    return found


def _sorted_out(
    fits: Sequence[FitConfig],
) -> tuple[list[FitConfig], list[str], list[Outcome]]:
    """Fits that are to be made, names of heads that are there, and files that are in the way."""
    present, waiting, failed = [], [], []
    for one in fits:
        name = Path(one.out).name
        if not os.path.exists(one.out):
            waiting.append(one)
        elif reason := in_the_way(one):
            failed.append(Outcome(name, error=reason))
        else:
            present.append(name)
    return waiting, present, failed


def in_the_way(wanted: FitConfig) -> str:
    """Why the file is not the head that is wanted; empty if it is."""
    try:
        entry: Entry = read_entry(wanted.out)
        made = parse_command(entry.command, "fit", FitConfig)
    except ValueError as error:
        return f"{error}; delete it or choose another --out"
    if told := differences(made, wanted):
        return f"is there, but of another recipe ({told}); choose another --out"
    if entry.network_id != FeatureCache(wanted.cache).network_id:
        return (
            f"is there, but of network {short(entry.network_id)}, not that of {wanted.cache}; "
            "make it again with `heads refit`, or choose another --out"
        )
    if place := changed_input(wanted, entry):
        return (
            f"is there, but {place} has been made again since, with another content; "
            "make it again with `heads refit`, or choose another --out"
        )
    return ""


def changed_input(wanted: FitConfig | AdaptConfig, made: Entry) -> str:
    """The first of its caches or its file of groups that is another now; empty if none is.

    Of heads that were made before hashes were kept nobody knows.
    """
    told = made.provenance
    for name, place in (("cache", wanted.cache), ("source", wanted.source)):
        known = told.get(f"{name}_hash")
        if place and known not in (None, layout.read(place).content_hash):
            return place
    groups, known = wanted.groups, told.get("groups_hash")
    return groups if groups and known not in (None, hash_file(groups)) else ""


# --------------------------------------------------------------------------- run


def _run(fits: Sequence[FitConfig | AdaptConfig], workers: Workers) -> Iterator[Outcome]:
    """Make heads by joblib; outcomes come as they are finished."""
    with _cluster(workers.scheduler):
        work = joblib.Parallel(n_jobs=workers.jobs, return_as="generator_unordered")
        yield from work(joblib.delayed(make)(one) for one in fits)


def make(config: FitConfig | AdaptConfig) -> Outcome:
    """One head; an error becomes part of the outcome, so that others go on."""
    name = Path(config.out).name
    try:
        if isinstance(config, FitConfig) and _made_meanwhile(config):
            return Outcome(name, read_entry(config.out).score)
        head = fit(config) if isinstance(config, FitConfig) else adapt(config)
    except Exception as error:
        line = " ".join(str(error).split())
        known = isinstance(error, (ValueError, OSError))
        return Outcome(name, error=line if known else f"{type(error).__name__}: {line}")
    return Outcome(name, float(head.provenance["score"]))


def _made_meanwhile(config: FitConfig) -> bool:
    """Whether another sweep into the same folder has made it since this one began."""
    return not config.overwrite and os.path.exists(config.out) and not in_the_way(config)


@contextmanager
def _cluster(scheduler: str) -> Iterator[None]:
    """joblib gives its work to the cluster of a scheduler, if one is named."""
    with ExitStack() as stack:
        if scheduler:
            try:
                from distributed import Client
            except ModuleNotFoundError as error:
                raise MissingExtra("distributed", "dask") from error
            stack.enter_context(Client(scheduler))
            stack.enter_context(joblib.parallel_config("dask"))
        yield
