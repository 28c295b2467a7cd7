"""Train an image network from scratch; stop and go on at any moment."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from featcache import batches, runs
from featcache.annotations import Labels
from featcache.atomic import clear_leftovers
from featcache.console import Interrupted, Progress, StopRequest, duration
from featcache.datasets import load_data
from featcache.errors import InputError, reason_of
from featcache.journal import Lock
from featcache.monitor import Score, TargetSource, summed_loss
from featcache.networks import (
    NetworkSpec,
    autocast,
    classifier,
    refuse_unfit,
    resolve_device,
    resolve_precision,
    resolve_preprocessing,
)
from featcache.optimisation import initialise_head, learning_rate, make_optimizer
from featcache.settings import CHANGEABLE, TrainingConfig, parse_kwargs
from featcache.views import Preprocessing, Recipe, augmentation, generator, normalise


@dataclass
class State:
    """Where a run stands; everything that a checkpoint needs besides tensors."""

    epoch: int = 0
    step: int = 0  # within the epoch
    best: float = -math.inf
    reductions: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    finished: bool = False
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


class Trainer:
    """One run: network, optimiser, schedule and where they stand."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.path = Path(config.out)
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.data = load_data(config)
        K = len(self.data.train_labels.classes)
        torch.manual_seed(config.seed)
        self.spec = NetworkSpec(config.arch, K, parse_kwargs(config.model_kwargs))
        network = self.spec.build()
        self.preprocessing: Preprocessing = resolve_preprocessing(
            network, config.image_size, config.crop
        )
        augmentation(config.augment, self.preprocessing)  # an unknown name is said now
        initialise_head(classifier(network, self.spec), self.data.train_labels)
        self.network = network.to(self.device).to(memory_format=self.spec.memory_format)
        refuse_unfit(self.network.eval(), self.spec, self.preprocessing)
        self.optimizer = make_optimizer(self.network, config)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "max", factor=config.reduction, patience=config.patience
        )
        self.state = State()
        self.targets = _target_source(self.data.train_labels)
        self.validation_targets = _target_source(self.data.validation_labels)
        self.steps = batches.steps_per_epoch(len(self.data.train), config.batch_size)

    def resolved(self) -> dict[str, Any]:
        """``config.json``: what was asked for and what it became on this machine."""
        return {
            "format": runs.FORMAT,
            "config": asdict(self.config),
            "network": asdict(self.spec),
            "preprocessing": asdict(self.preprocessing),
            "precision": self.precision,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "images": {
                "train": len(self.data.train),
                "validation": len(self.data.validation),
                "missing": len(self.data.missing),
                "sha256": self.data.digest(),
            },
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }

    # -- files ---------------------------------------------------------------------------

    def open_run(self) -> bool:
        """Prepare the folder, or take up the checkpoint in it; False if already finished.

        Raises
        ------
        InputError
            If the folder holds a run with other settings, or other files.
        """
        for name in runs.FILES:
            clear_leftovers(self.path / name)
        if self.config.overwrite:
            # The configuration goes last: a folder without it is not known to be a run.
            for name in reversed(runs.FILES):
                (self.path / name).unlink(missing_ok=True)
        elif (self.path / runs.CONFIG).is_file():
            self._refuse_difference(runs.read_config(self.path))
            if (self.path / runs.CHECKPOINT).is_file():
                self.load()
                return not self.state.finished
        elif any(not item.name.startswith(".") for item in self.path.iterdir()):
            raise InputError(
                f"{self.path}: not empty and not a run; give another --out or empty the folder"
            )
        # And comes first, for the same reason.
        runs.write_text(self.path / runs.CONFIG, json.dumps(self.resolved(), indent=1) + "\n")
        labels = self.data.train_labels
        names = labels.classes if labels.names is None else labels.names
        classes = zip(labels.classes, names, strict=True)
        runs.write_rows(self.path / runs.CLASSES, [("label_code", "description"), *classes])
        held_out = "".join(f"{i}\n" for i in self.data.validation.ids)
        runs.write_text(self.path / runs.VALIDATION_IDS, held_out)
        runs.write_text(self.path / runs.MISSING, "".join(f"{i}\n" for i in self.data.missing))
        return True

    def _refuse_difference(self, old: dict[str, Any]) -> None:
        new = json.loads(json.dumps(self.resolved()))
        before, now = ({**c.pop("config"), **c} for c in (old, new))
        differing = [k for k in now if k not in CHANGEABLE and before.get(k) != now[k]]
        if differing:
            table = "\n".join(f"  {k}: {before.get(k)!r} there, {now[k]!r} now" for k in differing)
            raise InputError(
                f"{self.path}: holds a run with other settings; give another --out, or "
                f"--overwrite to begin anew\n{table}"
            )

    def save(self) -> None:
        """Write the files that follow from the state, then the checkpoint.

        In this order, because nobody writes the former again once the latter says "finished".
        """
        if self.state.log:
            log = [tuple(row.values()) for row in self.state.log]
            runs.write_rows(self.path / runs.LOG, [tuple(self.state.log[0]), *log])
        if self.state.unreadable:
            bad = sorted(self.state.unreadable.items())
            runs.write_rows(self.path / runs.UNREADABLE, [("image_id", "reason"), *bad])
        state = {
            "state": asdict(self.state),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
        }
        runs.save_checkpoint(self.path / runs.CHECKPOINT, state)

    def load(self) -> None:
        """Take up the checkpoint.

        Raises
        ------
        InputError
            If it is damaged or of another network.
        """
        path = self.path / runs.CHECKPOINT
        saved = runs.load_checkpoint(path, self.device)
        try:
            self.state = State(**saved["state"])
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.plateau.load_state_dict(saved["plateau"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path}: does not fit this run ({reason_of(error)}); train with --overwrite"
            ) from error

    # -- training ------------------------------------------------------------------------

    def set_learning_rate(self) -> float:
        """That of the step which comes next."""
        done = self.state.epoch * self.steps + self.state.step
        total = self.config.epochs * self.steps
        lr = learning_rate(self.config, done, total, self.state.reductions)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def step(self, batch: batches.Batch) -> float:
        """One update; returns the mean summed loss of the batch.

        Raises
        ------
        InputError
            If the loss is not finite (names the images of the batch), or none of them is readable.
        """
        config, state = self.config, self.state
        # Chance inside the network (dropout, stochastic depth) is a function of the step.
        torch.manual_seed(
            int(generator("step", config.seed, state.epoch, state.step).integers(2**63))
        )
        self.set_learning_rate()
        readable = batch.readable
        for row, reason in zip(batch.rows, batch.reasons, strict=True):
            if reason is not None:
                self.state.unreadable[str(self.data.train.ids[row])] = reason
        if not readable.any():
            raise InputError(
                f"{config.images}: no image of a batch of {len(readable)} can be read "
                f"({self.data.train.ids[batch.rows[0]]}: {batch.reasons[0]}); check the files"
            )
        rows = batch.rows[readable]
        logits = self.forward(batch.pixels[torch.from_numpy(readable), 0])
        loss = summed_loss(logits, self.targets(rows, self.device), config.smoothing).mean()
        value = loss.item()
        if not math.isfinite(value):
            ids = " ".join(self.data.train.ids[rows][:8])
            raise InputError(
                f"{self.path}: the loss is {value} at epoch {state.epoch + 1}, step {state.step} "
                f"(images {ids} ...); the last checkpoint is kept; begin anew (--overwrite or "
                "another --out) with a lower --lr or with --clip"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimizer.step()
        return value

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images -> float32 logits."""
        images = normalise(pixels.to(self.device, non_blocking=True), self.preprocessing)
        images = images.contiguous(memory_format=self.spec.memory_format)
        with autocast(self.precision, self.device):
            logits: torch.Tensor = self.network(images)
        return logits.float()

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Loss and F2 of the held-out images."""
        recipe = Recipe("eval", self.config.seed, 0, self.preprocessing)
        images = batches.ViewImages(self.data.validation, recipe)
        size = min(4 * self.config.batch_size, 256)
        order = batches.row_batches([(0, len(self.data.validation))], size)
        score = Score(self.device)
        self.network.eval()
        for batch in batches.loader(images, order, self.config.workers, self.device):
            readable = batch.readable
            if readable.any():
                logits = self.forward(batch.pixels[torch.from_numpy(readable), 0])
                score.update(logits, self.validation_targets(batch.rows[readable], self.device))
        self.network.train()
        return score.result()

    def run(self) -> None:
        """Train to the end.

        Raises
        ------
        Interrupted
            After SIGINT or SIGTERM, once a checkpoint is written.
        """
        self.network.train()
        with StopRequest() as stop:
            while not self.state.finished:
                self._epoch(stop)

    def _epoch(self, stop: StopRequest) -> None:
        """The rest of an epoch, its evaluation and its checkpoint."""
        state, config = self.state, self.config
        images = batches.TrainingImages(
            self.data.train, self.preprocessing, config.augment, config.seed
        )
        order = batches.epoch_batches(
            len(self.data.train), config.batch_size, config.seed, state.epoch, state.step
        )
        per_step = min(config.batch_size, len(self.data.train))
        progress = Progress(self.steps * per_step, "images", state.step * per_step)
        started = saved = time.monotonic()
        before = state.seconds
        for batch in batches.loader(images, order, config.workers, self.device):
            loss = self.step(batch)
            state.step += 1
            state.loss_sum += loss
            state.loss_count += 1
            mean = state.loss_sum / max(1, state.loss_count)
            progress.advance(per_step, f"epoch {state.epoch + 1}/{config.epochs}, loss {mean:.3f}")
            now = time.monotonic()
            state.seconds = before + now - started
            if stop.asked:
                self._interrupt(progress)
            if now - saved > 60 * config.checkpoint_minutes:
                self.save()
                saved = now
        self._end_epoch(progress)

    def _interrupt(self, progress: Progress) -> None:
        progress.clear()
        self.save()
        done = self.state.epoch * self.steps + self.state.step
        without = " without --overwrite" if self.config.overwrite else ""
        raise Interrupted(
            f"stopped at step {done:,} of {self.config.epochs * self.steps:,}, checkpoint in "
            f"{self.path}; the same command{without} goes on from there"
        )

    def _end_epoch(self, progress: Progress) -> None:
        """Evaluate, keep the best weights, reduce the learning rate or stop, save.

        Raises
        ------
        InputError
            If the validation loss is not finite.
        """
        state, config = self.state, self.config
        rate = progress.rate
        progress.clear()
        result = self.evaluate()
        if not math.isfinite(result["loss"]):
            raise InputError(
                f"{self.path}: the validation loss is {result['loss']} after epoch "
                f"{state.epoch + 1}; the last checkpoint is kept; begin anew (--overwrite or "
                "another --out) with a lower --lr or with --clip"
            )
        train_loss = state.loss_sum / state.loss_count
        lr = self.optimizer.param_groups[0]["lr"]
        state.epoch, state.step, state.loss_sum, state.loss_count = state.epoch + 1, 0, 0.0, 0
        state.log.append(
            {"epoch": state.epoch, "lr": lr, "train_loss": train_loss, **result}
            | {"seconds": round(state.seconds, 1)}
        )
        if result["f2"] > state.best:
            state.best = result["f2"]
            runs.save_weights(self.path / runs.WEIGHTS, self.network)
        if config.schedule == "plateau":
            self.plateau.step(result["f2"])
            state.reductions += self.optimizer.param_groups[0]["lr"] < lr
        state.finished = state.epoch >= config.epochs or state.reductions > config.max_reductions
        self.save()
        left = state.seconds / state.epoch * (config.epochs - state.epoch)
        progress.print(
            f"{self.path.name}: epoch {state.epoch}/{config.epochs}, loss {train_loss:.3f}, "
            f"validation loss {result['loss']:.3f}, F2 {result['f2']:.4f} "
            f"at cut {result['threshold']:.3f}; {rate:,.0f} images/s, {duration(left)} left"
        )


def _target_source(labels: Labels) -> TargetSource:
    return TargetSource(
        labels.positives, labels.negatives, labels.unlisted == "negative", labels.outside
    )


def train(config: TrainingConfig) -> Path:
    """Train a network, or go on with a run that was stopped.

    Parameters
    ----------
    config : TrainingConfig
        Everything; ``config.out`` is the folder of the run.

    Returns
    -------
    Path
        The folder, with ``weights.safetensors`` of the best evaluation.

    Raises
    ------
    InputError
        Wrong input, a folder with another run, or a loss that is not finite.
    Interrupted
        After Ctrl-C or SIGTERM, once the checkpoint is written.

    Notes
    -----
    The loss is binary cross-entropy summed over classes. Order, augmentation and the
    network's own chance are functions of (seed, epoch, step), so a resumed run equals an
    unbroken one on the same machine with the same number of threads.
    """
    trainer = Trainer(config)
    trainer.path.mkdir(parents=True, exist_ok=True)
    lock = Lock(trainer.path / ".lock", trainer.path)
    try:
        _train(trainer)
    finally:
        lock.release()
    return trainer.path


def _train(trainer: Trainer) -> None:
    data, config = trainer.data, trainer.config
    print(
        f"{len(data.train):,} training and {len(data.validation):,} validation images, "
        f"{len(data.train_labels.classes):,} classes, {config.arch} at {config.image_size} px "
        f"on {trainer.device.type} in {trainer.precision}",
        flush=True,
    )
    if data.missing:
        print(
            f"{len(data.missing):,} labelled images have no file below {config.images}; "
            f"listed in {trainer.path / runs.MISSING}",
            flush=True,
        )
    if trainer.open_run():
        if trainer.state.epoch or trainer.state.step:
            print(
                f"going on at epoch {trainer.state.epoch + 1}, step {trainer.state.step}",
                flush=True,
            )
        trainer.run()
    best = max(trainer.state.log, key=lambda row: row["f2"])
    print(
        f"{trainer.path}: best validation F2 {best['f2']:.4f} in epoch {best['epoch']} "
        f"of {trainer.state.epoch}, {duration(trainer.state.seconds)} of training",
        flush=True,
    )
