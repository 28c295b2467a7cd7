"""The verbs of ``heads`` that are about many heads at once: sweep, list, info, compare, refit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from featcache.console import add_options, from_arguments, print_json
from heads import catalogue
from heads.comparing import compare
from heads.describing import describe
from heads.recipes import GRID_FORMAT
from heads.refitting import RefitConfig, refit
from heads.sweep import Sweep, SweepConfig, planned, sweep

Verb: TypeAlias = "Callable[..., argparse.ArgumentParser]"


def add(verb: Verb) -> None:
    """Add the verbs to the command line; `verb` makes a parser of name, function and text."""
    swept = verb(
        "sweep", _sweep, "fit a head for every combination of a grid, on every cache", GRID_FORMAT
    )
    swept.add_argument(
        "caches",
        nargs="+",
        metavar="CACHES",
        help="labelled caches of the target domain, one for each network; or their folder",
    )
    add_options(swept, SweepConfig)
    listed = verb("list", _list, "tell which heads and blends are in a folder, the best first")
    listed.add_argument("places", nargs="+", metavar="DIR", help="folders or files")
    listed.add_argument(
        "--sort", default="f2", choices=catalogue.SORTS, help="column (default: %(default)s)"
    )
    listed.add_argument("--json", action="store_true", help="a line of JSON for each file")
    told = verb("info", _info, "tell what is in a file, and the command that makes it again")
    told.add_argument("files", nargs="+", metavar="HEAD.h5", help="heads, adapted models, blends")
    told.add_argument("--json", action="store_true", help="a line of JSON for each file")
    compared = verb(
        "compare", _compare, "tell which of two heads is better on images that both held out"
    )
    compared.add_argument("first", metavar="A.h5", help="a head, an adapted model or a blend")
    compared.add_argument("second", metavar="B.h5", help="another one")
    again = verb(
        "refit", _refit, "fit every head of a folder again, by the same recipe, on new caches"
    )
    again.add_argument("folder", metavar="DIR", help="folder of heads")
    add_options(again, RefitConfig)


def _sweep(arguments: argparse.Namespace) -> int:
    config = from_arguments(SweepConfig, arguments, caches=arguments.caches)
    if config.dry_run:
        for one in planned(config):
            print("there  " if os.path.exists(one.out) else "to make", Path(one.out).name)
        return 0
    return _told(sweep(config), config.out)


def _told(done: Sweep, folder: str, left: str = "") -> int:
    """Print how many heads there are; the exit status."""
    total = len(done.made) + len(done.present) + len(done.failed)
    print(
        f"{folder}: {total:,} heads asked for, {len(done.made):,} made now, "
        f"{len(done.present):,} there before, {len(done.failed):,} failed{left}"
    )
    if done.failed:
        first = done.failed[0]
        print(
            f"heads: {len(done.failed):,} of {total:,} heads failed, the first is {first.name}: "
            f"{first.error}",
            file=sys.stderr,
        )
    return 1 if done.failed else 0


def _list(arguments: argparse.Namespace) -> int:
    found = catalogue.list_entries(arguments.places, arguments.sort)
    if arguments.json:
        for entry in found.entries:
            print_json(entry)
    elif found.entries:
        print(catalogue.table(found.entries))
    for reason in found.unreadable:
        print(f"heads: {reason}", file=sys.stderr)
    return 1 if found.unreadable else 0


def _info(arguments: argparse.Namespace) -> None:
    if arguments.json:
        for path in arguments.files:
            print_json(catalogue.read_entry(path))
    else:
        print("\n\n".join(describe(path) for path in arguments.files))


def _compare(arguments: argparse.Namespace) -> None:
    first, second = arguments.first, arguments.second
    comparisons = compare(first, second)
    for found in comparisons:
        print(
            f"{found.domain}, {found.images:,} common images: F{found.beta:g} {found.first:.4f} "
            f"and {found.second:.4f}, difference {found.difference:+.4f} "
            f"[{found.low:+.4f}, {found.high:+.4f}] (95 % paired bootstrap): "
            f"{found.verdict(first, second)}"
        )
    if any(found.chosen_here for found in comparisons):
        print("note: the weights of a blend were chosen on these images, which favours it")


def _refit(arguments: argparse.Namespace) -> int:
    config = from_arguments(RefitConfig, arguments, folder=arguments.folder)
    done = refit(config)
    left = f"; {len(done.left):,} files of {config.folder} left as they are" if done.left else ""
    return _told(done.sweep, config.out or config.folder, left)
