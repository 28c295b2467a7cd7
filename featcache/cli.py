"""The command ``featcache``: train, import, extract, info, verify, merge, concat."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from featcache import __version__
from featcache.cache import FeatureCache
from featcache.cacheset import CacheSet
from featcache.console import (
    Parser,
    add_common,
    add_options,
    examples_of,
    from_arguments,
    print_json,
    run,
    with_torch,
)
from featcache.errors import InputError
from featcache.settings import (
    ConcatConfig,
    ExtractionConfig,
    ImportConfig,
    MergeConfig,
    TrainingConfig,
)
from featcache.summary import facts, summary

EPILOG = """examples:
  featcache train --images train/ --labels train_human_labels.csv \\
      --labels train_machine_labels.csv --classes classes-trainable.csv \\
      --validation 100000 --arch resnet101 --out runs/resnet101
  featcache extract --run runs/resnet101 --images stage_1/ --labels tuning_labels.csv \\
      --views strong --out caches/stage_1/resnet101.h5
  featcache import --arch resnet50 --weights mine.pth --classes classes.csv --out runs/mine
  featcache info caches/stage_1/resnet101.h5
  featcache info caches/
  featcache info caches/ --json
  featcache verify caches/stage_1/*.h5
  featcache merge first_half.h5 second_half.h5 --out caches/stage_2/resnet101.h5
  featcache concat caches/stage_1/resnet101.h5 caches/stage_1/senet154.h5 \\
      --out caches/stage_1/both.h5
"""


def _train(arguments: argparse.Namespace) -> None:
    with_torch()
    from featcache.training import train

    train(from_arguments(TrainingConfig, arguments))


def _import(arguments: argparse.Namespace) -> None:
    with_torch()
    from featcache.importing import import_checkpoint

    done = import_checkpoint(from_arguments(ImportConfig, arguments))
    p = done.preprocessing
    taken = f"{done.part} of {arguments.weights}" if done.part else arguments.weights
    print(
        f"{done.path}: {arguments.arch} with the weights {taken}\n"
        f"images: {p.image_size} x {p.image_size} pixels, crop {p.crop:g}, {p.interpolation}, "
        f"mean {_channels(p.mean)}, std {_channels(p.std)}; is that what it was trained with?\n"
        f"next: featcache extract --run {done.path} --images DIR --out CACHE.h5"
    )


def _channels(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _extract(arguments: argparse.Namespace) -> None:
    with_torch()
    from featcache.extraction import extract

    path = extract(from_arguments(ExtractionConfig, arguments))
    if path is not None:
        print(summary(FeatureCache(path)))


def _info(arguments: argparse.Namespace) -> int:
    def show(path: str) -> bool:
        if arguments.json:
            for cache in CacheSet(path):
                print_json(facts(cache))
        else:
            print(CacheSet(path) if os.path.isdir(path) else summary(FeatureCache(path)))
        return True

    return _each(show, arguments)


def _verify(arguments: argparse.Namespace) -> int:
    def is_sound(path: str) -> bool:
        cache = FeatureCache(path)
        parts, bad = cache.damaged(), cache.verify()
        if bad:
            rows = ", ".join(f"{start} to {stop - 1}" for start, stop in bad)
            what = f"damaged in {', '.join(parts)}, so in all" if parts else "damaged in"
            print(f"{path}: {what} rows {rows}; extract it again with --overwrite")
        else:
            print(f"{path}: every block has its hash")
        return not bad

    return _each(is_sound, arguments)


def _each(is_well: Callable[[str], bool], arguments: argparse.Namespace) -> int:
    """Ask of every cache, also after one that cannot be opened; the exit status.

    0 if all are well, 2 if none of them can be opened, else 1.
    """
    well = refused = 0
    for path in arguments.caches:
        try:
            well += is_well(path)
        except (InputError, OSError) as error:
            if len(arguments.caches) == 1 or isinstance(error, BrokenPipeError):
                raise
            if arguments.debug:
                traceback.print_exc()
            sys.stdout.flush()  # so that lines of both kinds come in the order of the files
            named = error if isinstance(error, InputError) else f"{path}: {error}"
            print(f"featcache: {named}", file=sys.stderr)
            refused += 1
    if well == len(arguments.caches):
        return 0
    return 2 if refused == len(arguments.caches) else 1


def _merge(arguments: argparse.Namespace) -> None:
    from featcache.merging import merge

    config = from_arguments(MergeConfig, arguments, parts=arguments.parts)
    path = merge(config.parts, config.out, mixed=config.mixed, overwrite=config.overwrite)
    print(summary(FeatureCache(path)))


def _concat(arguments: argparse.Namespace) -> None:
    from featcache.concatenation import concatenate

    config = from_arguments(ConcatConfig, arguments, caches=arguments.caches)
    print(summary(FeatureCache(concatenate(config.caches, config.out, config.overwrite))))


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: what does it, what its help says, its positional arguments and its options."""

    name: str
    function: Callable[[argparse.Namespace], int | None]
    text: str
    about: str
    files: tuple[str, str] | None = None  # name and metavar
    options: type | None = None
    json: bool = False  # whether it can answer other programs


VERBS = (
    Verb(
        "train",
        _train,
        "train a network from scratch",
        "Stop it whenever you like (Ctrl-C, kill): the same command goes on, and the result "
        "is that of an unbroken run. RUN gets the best weights, log.csv and curves.png by "
        "epoch, and a README.md on what was trained and how well it does. On several GPUs or "
        "machines: torchrun --nproc-per-node N -m -- featcache train ...; --batch-size stays "
        "that of all together.",
        options=TrainingConfig,
    ),
    Verb(
        "import",
        _import,
        "make a run of a network that was trained elsewhere",
        "Its weights must be all those of the architecture and no others.",
        options=ImportConfig,
    ),
    Verb(
        "extract",
        _extract,
        "write the penultimate embeddings of an image set to a cache",
        "Stop it whenever you like: the same command goes on, and is refused if the network, the "
        "views (and their code, if it is your own), the images or the labels are others by then. "
        "An image that cannot be read keeps its row, marked invalid. On several GPUs: torchrun "
        "--nproc-per-node N -m -- featcache extract --run RUN ... (the -- keeps torchrun from "
        "taking --run for its own); any number of processes may go on with what others began.",
        options=ExtractionConfig,
    ),
    Verb(
        "info",
        _info,
        "show what is inside a cache, in one screen",
        "Of a folder: a table of the caches in it and below, networks by image sets. Of several "
        "the others are shown after one that cannot be opened; exit status 1.",
        files=("caches", "CACHE.h5|DIR"),
        json=True,
    ),
    Verb(
        "verify",
        _verify,
        "hash every block again",
        "Exit status 1 names the rows that are damaged. Of several the others are looked at after "
        "one that cannot be opened.",
        files=("caches", "CACHE.h5"),
    ),
    Verb(
        "merge",
        _merge,
        "join caches of one network",
        "Finished caches of different images (made on two machines, say) are joined in the order "
        "given; unfinished parts (*.partial, with their *.journal beside) are those of one "
        "extraction by several processes.",
        files=("parts", "PART.h5"),
        options=MergeConfig,
    ),
    Verb(
        "concat",
        _concat,
        "put the features of several networks on the same images side by side",
        "The result is the cache of one more network: a head on it weighs the features of all "
        "networks together. Its last layer gives the mean of the networks' margins. Do the same "
        "for every image set that the head will see.",
        files=("caches", "CACHE.h5"),
        options=ConcatConfig,
    ),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="featcache",
        description="Train image networks from scratch and cache their embeddings in HDF5.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(top, __version__)
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        added = verbs.add_parser(
            verb.name,
            help=verb.text,
            description=textwrap.fill(f"{verb.text[0].upper()}{verb.text[1:]}. {verb.about}", 78),
            epilog=examples_of(f"featcache {verb.name}", EPILOG),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--debug", action="store_true", help="show tracebacks")
        added.set_defaults(function=verb.function)
        if verb.files is not None:
            name, metavar = verb.files
            added.add_argument(name, nargs="+", metavar=metavar)
        if verb.json:
            added.add_argument("--json", action="store_true", help="a line of JSON for each cache")
        if verb.options is not None:
            add_options(added, verb.options)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
