"""Train an image network from scratch; stop and go on at any moment."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch

from featcache import announcements, batches, runs
from featcache.atomic import refuse_unwritable_folder
from featcache.checkpoints import State, checkpoint, open_folder, write_log
from featcache.console import Interrupted, Progress, StopRequest, duration
from featcache.curves import can_draw, draw_curves
from featcache.datasets import Data, load_data
from featcache.errors import InputError, reason_of
from featcache.journal import Lock
from featcache.learner import Learner
from featcache.modelcard import write_card
from featcache.networks import resolve_device
from featcache.settings import TrainingConfig
from featcache.updates import NotFinite
from featcache.world import World, joined

_SECONDS_BETWEEN_PICTURES = 60.0


class Trainer(Learner):
    """One run: a network that learns, epoch by epoch, and the folder that keeps it.

    Parameters
    ----------
    config : TrainingConfig
    world : World, optional
        The processes that train together; without it this one alone.
    """

    def __init__(self, config: TrainingConfig, world: World | None = None) -> None:
        if world is None:
            world = World(resolve_device(config.device))
        super().__init__(config, world, _load_data(config, world))
        self.path = Path(config.out)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            "max" if config.monitor == "f2" else "min",
            factor=config.reduction,
            patience=config.patience,
        )
        self._drawn = time.monotonic()

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
            "micro_batch": self.micro_batch,
            "processes": self.world.size,
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
            If the folder holds a run with other settings, or other files, or a checkpoint
            that is damaged or of another network.
        """
        resolved = self.resolved()
        saved = self.world.first_does(
            lambda: open_folder(self.path, resolved, self.data, self.config.overwrite)
        )
        if saved is None:
            return True
        try:
            self.state = State(**saved["state"])
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.plateau.load_state_dict(saved["plateau"])
            if self.average is not None:
                self.average.module.load_state_dict(saved["average"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.path / runs.CHECKPOINT}: does not fit this run ({reason_of(error)}); "
                "train with --overwrite"
            ) from error
        return not self.state.finished

    def save(self, evaluated: bool = False) -> None:
        """Write the files that follow from the state, then the checkpoint.

        In this order, because nobody writes the former again once the latter says "finished".

        Raises
        ------
        InputError
            If the disk is full, or a weight is not finite; the last checkpoint stays.
        """
        for unreadable in self.world.gather(self.state.unreadable):
            self.state.unreadable |= unreadable
        self.world.first_does(lambda: self._write(evaluated))

    def _write(self, evaluated: bool) -> None:
        self._refuse_broken_weights()
        write_log(self.path, self.state)
        if evaluated:
            write_card(self.path, self.resolved(), self.data, self.network, self.state)
            self._draw()
        state = checkpoint(
            self.state,
            network=self.network,
            optimizer=self.optimizer,
            plateau=self.plateau,
            average=None if self.average is None else self.average.module,
        )
        runs.save_checkpoint(self.path / runs.CHECKPOINT, state)

    def _draw(self) -> None:
        """At the end, and before it not so often that short epochs would wait for pictures."""
        due = self.state.finished or time.monotonic() - self._drawn > _SECONDS_BETWEEN_PICTURES
        if due and can_draw():
            draw_curves(self.path, self.state.log)
            self._drawn = time.monotonic()

    def _refuse_broken_weights(self) -> None:
        # A finite loss can have gradients that are not.
        finite = torch.stack([p.isfinite().all() for p in self.network.parameters()])
        if not finite.all():
            raise self._fault("weights are not finite", f"step {self.state.step}")

    def _fault(self, what: str, where: str, images: str = "") -> InputError:
        return InputError(
            f"{self.path}: {what} at epoch {self.state.epoch + 1}, {where}{images}; the last "
            "checkpoint is kept; begin anew (--overwrite or another --out) with a lower --lr or "
            "with --clip"
        )

    # -- training ------------------------------------------------------------------------

    def step(self, parts: Iterable[batches.Batch]) -> float:
        """One update; returns the mean summed loss.

        Raises
        ------
        InputError
            If the loss is not finite (names the images), or no image is readable.
        """
        try:
            return super().step(parts)
        except NotFinite as fault:
            raise self._bad_batch(fault) from None

    def _bad_batch(self, fault: NotFinite) -> InputError:
        """The error that names the images, all of which go to a file."""
        mine = self.data.train.ids[fault.rows].tolist()
        ids = [image_id for part in self.world.gather(mine) for image_id in part]
        if self.world.first:
            runs.write_text(self.path / runs.BAD_BATCH, "".join(f"{i}\n" for i in ids))
        shown = " ".join(ids[:8]) + (f" ... all in {runs.BAD_BATCH}" if len(ids) > 8 else "")
        return self._fault(
            f"the loss is {fault.loss}", f"step {self.state.step}", f" (images {shown})"
        )

    def run(self) -> None:
        """Train to the end.

        Raises
        ------
        Interrupted
            After SIGINT or SIGTERM, once a checkpoint is written.
        """
        self.network.train()
        with StopRequest(patient=self.world.size > 1) as stop:
            while not self.state.finished:
                self._epoch(stop)

    def _epoch(self, stop: StopRequest) -> None:
        """The rest of an epoch, its evaluation and its checkpoint."""
        state, config, world = self.state, self.config, self.world
        images = batches.TrainingImages(
            self.data.train, self.preprocessing, config.augment, config.seed, self.photo
        )
        order = batches.epoch_batches(
            len(self.data.train), config.batch_size, config.seed, state.epoch, state.step
        )
        mine = batches.dealt_out(order, self.micro_batch, world.rank, world.size)
        progress = Progress(
            self.steps * self.images_per_step,
            "images",
            state.step * self.images_per_step,
            None if world.first else io.StringIO(),
        )
        started = saved = time.monotonic()
        before, waiting = state.seconds, 0.0
        with contextlib.closing(batches.loader(images, mine, config.workers, self.device)) as parts:
            clocked = batches.Clocked(parts)
            while state.step < self.steps:
                loss = self.step(islice(clocked, self.parts))
                state.step += 1
                state.loss_sum += loss
                state.loss_count += 1
                now = time.monotonic()
                state.seconds = before + now - started
                waiting = clocked.waited / max(now - started, 1e-9)
                mean = state.loss_sum / state.loss_count
                progress.advance(
                    self.images_per_step,
                    f"epoch {state.epoch + 1}/{config.epochs}, loss {mean:.3f}, "
                    f"{waiting:.0%} waiting for images",
                )
                saved = self._obey(stop, saved, progress)
        self._end_epoch(progress, waiting)

    def _obey(self, stop: StopRequest, saved: float, progress: Progress) -> float:
        """Stop or save where that is due; returns when the last checkpoint was written."""
        due = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
        self.wishes = stop.asked, due
        # Several processes do what any of them wants once all know it, a step later.
        stopping, saving = self.wishes if self.world.size == 1 else self.agreed
        if stopping:
            self._interrupt(progress, stop)
        if saving:
            self.save()
            saved = time.monotonic()
            self.wishes = stop.asked, False
        return saved

    def _interrupt(self, progress: Progress, stop: StopRequest) -> None:
        progress.clear()
        self.save()
        without = " without --overwrite" if self.config.overwrite else ""
        raise Interrupted(
            f"stopped at step {self.done:,} of {self.config.epochs * self.steps:,}, checkpoint in "
            f"{self.path}; the same command{without} goes on from there",
            # A batch system takes anything else for a failure. It may have told another process.
            130 if stop.asked and not stop.terminated else 0,
        )

    def _end_epoch(self, progress: Progress, waiting: float) -> None:
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
            | {"images_per_second": round(rate, 1), "waiting": round(waiting, 3)}
        )
        self._judge(result, lr)
        state.finished = state.epoch >= config.epochs or state.reductions > config.max_reductions
        self.save(evaluated=True)
        left = state.seconds / state.epoch * (config.epochs - state.epoch)
        if self.world.first:
            progress.print(
                f"{self.path.name}: epoch {state.epoch}/{config.epochs}, loss {train_loss:.3f}, "
                f"validation loss {result['loss']:.3f}, F2 {result['f2']:.4f} "
                f"at cut {result['threshold']:.3f}; {rate:,.0f} images/s, "
                f"{waiting:.0%} waiting, {duration(left)} left"
            )

    def _judge(self, result: dict[str, float], lr: float) -> None:
        """Keep the weights if they are the best so far; count a reduction if it is due."""
        state, monitor = self.state, self.config.monitor
        merit = result["f2"] if monitor == "f2" else -result["loss"]
        if merit > state.best:
            state.best = merit
            self.world.first_does(
                lambda: runs.save_weights(self.path / runs.WEIGHTS, self.evaluated)
            )
        if self.config.schedule == "plateau":
            self.plateau.step(result[monitor])
            state.reductions += self.optimizer.param_groups[0]["lr"] < lr


def _load_data(config: TrainingConfig, world: World) -> Data:
    data = world.one_a_machine_before(lambda: load_data(config))
    if len(set(world.gather(data.digest()))) > 1:
        raise InputError(
            f"{config.images}: the processes see different images or labels; "
            "bring the same files to all machines"
        )
    return data


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
    unbroken one on the same machine with the same number of threads. Processes that torchrun
    has started share the work; the first one writes the folder.
    """
    with joined(config.device) as world:
        world.first_does(lambda: refuse_unwritable_folder(config.out))
        trainer = Trainer(config, world)
        lock = world.first_does(lambda: _locked(trainer.path))
        try:
            _train(trainer)
        finally:
            if world.first:
                lock.release()
    return trainer.path


def _locked(path: Path) -> Lock:
    path.mkdir(parents=True, exist_ok=True)
    return Lock(path / ".lock", path)


def _train(trainer: Trainer) -> None:
    def say(lines: list[str]) -> None:
        if trainer.world.first:
            print("\n".join(lines), flush=True)

    say(announcements.beginning(trainer, trainer.path))
    if trainer.open_run():
        if trainer.state.epoch or trainer.state.step:
            say([f"going on at epoch {trainer.state.epoch + 1}, step {trainer.state.step}"])
        trainer.run()
    say(announcements.ending(trainer.config, trainer.path, trainer.state))
