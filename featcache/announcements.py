"""What is said when a training begins and ends?"""

from __future__ import annotations

from pathlib import Path

from featcache import runs
from featcache.checkpoints import State
from featcache.console import duration
from featcache.learner import Learner
from featcache.settings import TrainingConfig


def beginning(learner: Learner, path: Path) -> list[str]:
    """What is trained on what, and what may not be as the user thinks it is."""
    config, data, world = learner.config, learner.data, learner.world
    processes = f", {world.size} processes" if world.size > 1 else ""
    lines = [
        f"{len(data.train):,} training and {len(data.validation):,} validation images, "
        f"{len(data.train_labels.classes):,} classes, {config.arch} at {config.image_size} px "
        f"on {learner.device.type} in {learner.precision}{processes}"
    ]
    if data.missing:
        lines.append(
            f"{len(data.missing):,} labelled images have no file below {config.images}; "
            f"listed in {path / runs.MISSING}"
        )
    steps = config.epochs * learner.steps
    if config.warmup_steps > steps / 2:
        when = "only late" if config.warmup_steps <= steps else "never"
        lines.append(
            f"the learning rate reaches --lr {config.lr:g} {when}: {config.warmup_steps:,} of "
            f"{steps:,} steps in all are warm-up; consider fewer --warmup-steps"
        )
    return lines


def ending(config: TrainingConfig, path: Path, state: State) -> list[str]:
    """How well the network does, and what comes next."""
    key, sign = ("f2", 1) if config.monitor == "f2" else ("loss", -1)
    best = max(state.log, key=lambda row: sign * row[key])
    return [
        f"{path}: best validation F2 {best['f2']:.4f} in epoch {best['epoch']} "
        f"of {state.epoch}, {duration(state.seconds)} of training",
        f"next: featcache extract --run {path} --images DIR --out CACHE.h5",
    ]
