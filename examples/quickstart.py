"""From pixels to a submission on real images: python -m examples.quickstart.

Trains three small networks from scratch on kanji in printed typefaces, caches their
embeddings, adapts heads to a brush script with 1,000 labelled characters, on the features of each
network and on those of all, blends them,
writes submissions for that script and for two that nobody has labels of, and prints how
much of the domain shift was recovered. Every step is a function call that stands for one
command of ``featcache`` or ``heads``; the command is printed too. What is already in the
output folder is not made again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples import kanji
from examples.recovery import ALL, CONCATENATED, Recovery, caches_of
from featcache.concatenation import concatenate
from featcache.console import Interrupted, command_line, duration
from featcache.extraction import extract
from featcache.networks import cpu_has_bf16
from featcache.settings import ConcatConfig, ExtractionConfig, TrainingConfig
from featcache.training import train
from heads import commands
from heads.commands import BlendConfig, FitConfig

TARGET, UNSEEN = "gyosho", ("sousyo", "soseki")
VIEWS = 3
SOURCE_ROWS = 600  # enough to hold on to the source; more cost time


@dataclass(frozen=True)
class Recipe:
    """A network of the quickstart: its width, its image size and how long it trains."""

    name: str
    width: int
    image_size: int
    epochs: int
    lr: float


RECIPES = (
    Recipe("wide32", width=32, image_size=32, epochs=6, lr=2e-3),
    Recipe("slim32", width=16, image_size=32, epochs=8, lr=3e-3),
    Recipe("slim40", width=16, image_size=40, epochs=7, lr=3e-3),
)


def training_config(recipe: Recipe, data: Path, out: Path, seed: int) -> TrainingConfig:
    """``featcache train`` of one network; steps are fixed, not seconds."""
    return TrainingConfig(
        images=str(data / "train"),
        labels=[str(data / "train_human_labels.csv")],
        classes=str(data / "classes-trainable.csv"),
        descriptions=str(data / "class-descriptions.csv"),
        validation=str(data / "validation_ids.txt"),
        arch="examples.kanji:small_resnet",
        model_kwargs=[f"width={recipe.width}"],
        image_size=recipe.image_size,
        crop=kanji.CROP,
        augment="examples.kanji:augment",
        epochs=recipe.epochs,
        batch_size=32,
        optimizer="adamw",
        lr=recipe.lr,
        weight_decay=0.05,
        warmup_steps=200,
        schedule="cosine",
        precision="bf16" if cpu_has_bf16() else "auto",
        workers=0,
        threads=1,  # the networks train side by side, and small tensors gain little from threads
        seed=seed,
        out=str(out / "runs" / recipe.name),
    )


def extraction_configs(recipe: Recipe, data: Path, out: Path, seed: int) -> list[ExtractionConfig]:
    """``featcache extract`` of one network on every image set."""

    def cache(image_set: str, images: Path, labels: str, **more: Any) -> ExtractionConfig:
        return ExtractionConfig(
            run=str(out / "runs" / recipe.name),
            images=str(images),
            out=str(out / "caches" / image_set / f"{recipe.name}.h5"),
            labels=[str(data / labels)] if labels else [],
            workers=0,
            threads=1,
            seed=seed,
            **more,
        )

    random = {"views": "strong", "view_count": VIEWS}
    sets = [
        cache(
            "validation",
            data / "train",
            "train_human_labels.csv",
            ids=str(data / "validation_ids.txt"),
            **random,
        ),
        cache(
            f"{TARGET}_stage_1", data / TARGET / "stage_1", f"{TARGET}/tuning_labels.csv", **random
        ),
    ]
    for font in UNSEEN:
        sets.append(cache(f"{font}_stage_2", data / font / "stage_2", "", **random))
    # For the oracle alone: what would be possible with thousands of labels in that very typeface.
    for font, folder in Recovery.oracle_folders(TARGET, UNSEEN):
        sets.append(cache(f"oracle_{font}_{folder}", data / font / folder, ""))
    return sets


def concat_configs(recipes: Sequence[Recipe], out: Path) -> list[ConcatConfig]:
    """``featcache concat`` of every image set: the features of all networks, side by side."""
    sets = ("validation", f"{TARGET}_stage_1", *(f"{font}_stage_2" for font in UNSEEN))
    return [
        ConcatConfig(
            caches=[str(out / "caches" / name / f"{recipe.name}.h5") for recipe in recipes],
            out=str(out / CONCATENATED / name / f"{ALL}.h5"),
        )
        for name in sets
    ]


def fit_configs(network: str, out: Path, seed: int) -> list[FitConfig]:
    """``heads fit``: both methods, on Stage 1 alone and on Stage 1 and validation."""

    def cache(image_set: str) -> str:
        folder = CONCATENATED if network == ALL else "caches"
        return str(out / folder / image_set / f"{network}.h5")

    def head(method: str, name: str, **more: Any) -> FitConfig:
        return FitConfig(
            cache=cache(f"{TARGET}_stage_1"),
            method=method,
            dropout="0.02,0.05,0.1,0.2,0.35",
            seed=seed,
            out=str(out / "heads" / f"{network}_{name}.h5"),
            **more,
        )

    both = {
        "source": cache("validation"),
        "source_rows": SOURCE_ROWS,
        "source_weight": "0.2",
        "groups": str(out / "data" / kanji.GROUPS),
    }
    return [
        head(method, name + method, **more)
        for method in ("logistic", "ridge")
        for name, more in (("", {}), ("both_", both))
    ]


def step(verb: str, config: Any, make: Callable[[Any], Any], *positional: str) -> None:
    """Print the command, and run it unless its result is there."""
    print(f"\n$ {command_line(verb, config, *positional)}", flush=True)
    finished = Path(config.out).is_file()
    if finished:
        print(f"{config.out} is there already", flush=True)
        return
    start = time.monotonic()
    make(config)
    print(f"({duration(time.monotonic() - start)})", flush=True)


def predict_and_score(blend: Path, image_set: str, labels: Path, out: Path) -> None:
    """``heads predict`` and ``heads score`` for one image set."""
    submission = out / "submissions" / f"{image_set}.csv"
    caches = [str(path) for path in caches_of(out, image_set)]
    print(f"\n$ heads predict {blend} --caches {' '.join(caches)} --out {submission}")
    done = commands.predict(str(blend), caches, str(submission), overwrite=True)
    print(f"{submission}: {done.images:,} images, {done.empty:,} of them without a label")
    print(f"$ heads score {submission} --labels {labels}")
    result = commands.score(str(submission), [str(labels)])
    print(f"mean F2 {result['fbeta']:.4f} [{result['low']:.4f}, {result['high']:.4f}]", flush=True)


def concat(config: ConcatConfig) -> None:
    """``featcache concat``."""
    concatenate(config.caches, config.out, config.overwrite)


def network_and_caches(recipe: Recipe, data: Path, out: Path, seed: int) -> None:
    """Train one network and extract all its caches."""
    step("featcache train", training_config(recipe, data, out, seed), train)
    for config in extraction_configs(recipe, data, out, seed):
        step("featcache extract", config, extract)


def _end_with_parent(parent: int) -> None:
    """A process of the pool must not train on when the quickstart was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def side_by_side(recipes: Sequence[Recipe], data: Path, out: Path, seed: int) -> None:
    """All networks at once, a process each: better use of two cores than two threads for one.

    On a GPU box one would run one command after the other.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(recipes), context, _end_with_parent, (os.getpid(),)) as pool:
        jobs = [pool.submit(network_and_caches, r, data, out, seed) for r in recipes]
        for job in jobs:
            job.result()


def quickstart(out: Path, seed: int = 0, recipes: tuple[Recipe, ...] = RECIPES) -> Recovery:
    """All steps; returns the table of what was recovered."""
    data = kanji.unpack(out / "data")
    side_by_side(recipes, data, out, seed)
    networks = [recipe.name for recipe in recipes]
    if len(recipes) > 1:
        for config in concat_configs(recipes, out):
            step("featcache concat", config, concat, *config.caches)
        networks.append(ALL)
    heads: list[str] = []
    for network in networks:
        for fitting in fit_configs(network, out, seed):
            step("heads fit", fitting, commands.fit, fitting.cache)
            heads.append(fitting.out)
    blend = BlendConfig(heads=heads, out=str(out / "blend.h5"))
    step("heads blend", blend, commands.blend, *heads)
    stages = [(f"{TARGET}_stage_1", data / TARGET / "stage_1_solution.csv")]
    stages += [(f"{font}_stage_2", data / font / "stage_2_solution.csv") for font in UNSEEN]
    for image_set, labels in stages:
        predict_and_score(Path(blend.out), image_set, labels, out)
    recovery = Recovery(out, data, TARGET, UNSEEN, [recipe.name for recipe in recipes], seed)
    recovery.measure()
    return recovery


def main() -> int:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(
        description="Pixels to submission on real images.",
        epilog="Interrupt it whenever you like; the same command goes on.",
    )
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument(
        "--epochs", type=int, help="train every network that long (default: 6 to 8 epochs)"
    )
    arguments = parser.parse_args()
    recipes: tuple[Recipe, ...] = RECIPES
    if arguments.epochs:
        recipes = tuple(replace(recipe, epochs=arguments.epochs) for recipe in recipes)
    start = time.monotonic()
    try:
        recovery = quickstart(arguments.out, arguments.seed, recipes)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"quickstart: {stop or 'interrupted'}; the same command goes on")
        return 130
    recovery.save()
    print(f"\n{recovery.table()}")
    print(f"\n{recovery.note()}")
    print(f"\nAll of it took {duration(time.monotonic() - start)}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
