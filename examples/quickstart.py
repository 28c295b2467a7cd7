"""From pixels to a submission on real images: python -m examples.quickstart.

Trains three small networks from scratch on kanji in printed typefaces, caches their
embeddings, adapts heads to a brush script with 1,000 labelled characters, blends them,
writes submissions for that script and for two that nobody has labels of, and prints how
much of the domain shift was recovered. Every step is a function call that stands for one
command of ``featcache`` or ``heads``; the command is printed too. What is already in the
output folder is not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples import kanji
from examples.recovery import Recovery
from featcache.console import Interrupted, command_line, duration
from featcache.extraction import extract
from featcache.networks import cpu_has_bf16
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.training import train
from heads import commands
from heads.commands import BlendConfig, FitConfig

TARGET, UNSEEN = "gyosho", ("sousyo", "soseki")
VIEWS = 3


@dataclass(frozen=True)
class Recipe:
    """A network of the quickstart: its width, its image size and how long it trains."""

    name: str
    width: int
    image_size: int
    epochs: int
    lr: float


RECIPES = (
    Recipe("wide32", width=32, image_size=32, epochs=5, lr=2e-3),
    Recipe("slim32", width=16, image_size=32, epochs=7, lr=3e-3),
    Recipe("slim48", width=16, image_size=48, epochs=5, lr=3e-3),
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
        augment="examples.kanji:augment",
        epochs=recipe.epochs,
        batch_size=32,
        optimizer="adamw",
        lr=recipe.lr,
        weight_decay=0.05,
        warmup_steps=200,
        schedule="cosine",
        precision="bf16" if cpu_has_bf16() else "auto",
        workers=1,
        threads=1,  # the second of two cores augments; small tensors gain little from threads
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
            workers=1,
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


def fit_configs(recipe: Recipe, out: Path, seed: int) -> list[FitConfig]:
    """``heads fit``: both methods, on Stage 1 alone and on Stage 1 and validation."""
    caches = out / "caches"
    validation = str(caches / "validation" / f"{recipe.name}.h5")
    return [
        FitConfig(
            cache=str(caches / f"{TARGET}_stage_1" / f"{recipe.name}.h5"),
            source=validation if both else "",
            method=method,
            seed=seed,
            out=str(out / "heads" / f"{recipe.name}_{method}{'_both' if both else ''}.h5"),
        )
        for method in ("logistic", "ridge")
        for both in (False, True)
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
    print(f"\n$ heads predict {blend} --caches {out / 'caches' / image_set} --out {submission}")
    rows, empty = commands.predict(
        str(blend), [str(out / "caches" / image_set)], str(submission), overwrite=True
    )
    print(f"{submission}: {rows:,} images, {empty:,} of them without a label")
    print(f"$ heads score {submission} --labels {labels}")
    result = commands.score(str(submission), [str(labels)])
    print(f"mean F2 {result['fbeta']:.4f} [{result['low']:.4f}, {result['high']:.4f}]", flush=True)


def quickstart(out: Path, seed: int = 0, recipes: tuple[Recipe, ...] = RECIPES) -> Recovery:
    """All steps; returns the table of what was recovered."""
    data = kanji.unpack(out / "data")
    for recipe in recipes:
        step("featcache train", training_config(recipe, data, out, seed), train)
    for recipe in recipes:
        for config in extraction_configs(recipe, data, out, seed):
            step("featcache extract", config, extract)
    heads: list[str] = []
    for recipe in recipes:
        for fitting in fit_configs(recipe, out, seed):
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
        "--epochs", type=int, help="train every network that long (default: 5 to 7 epochs)"
    )
    arguments = parser.parse_args()
    recipes: tuple[Recipe, ...] = RECIPES
    if arguments.epochs:
        recipes = tuple(replace(recipe, epochs=arguments.epochs) for recipe in recipes)
    start = time.monotonic()
    try:
        recovery = quickstart(arguments.out, arguments.seed, recipes)
    except Interrupted as stop:
        print(f"quickstart: {stop}")
        return 130
    recovery.save()
    print(f"\n{recovery.table()}")
    print(f"\n{recovery.note()}")
    print(f"\nAll of it took {duration(time.monotonic() - start)}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
