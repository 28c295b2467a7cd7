"""How does a network learn from the images of one step, and how well does it do?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from featcache import batches
from featcache.checkpoints import State
from featcache.datasets import Data
from featcache.errors import InputError
from featcache.losses import training_loss
from featcache.monitor import Score
from featcache.networks import (
    autocast,
    checkpoint_gradients,
    classifier,
    refuse_unfit,
    resolve_precision,
    resolve_preprocessing,
    training_spec,
)
from featcache.optimisation import initialise_head, learning_rate, make_average, make_optimizer
from featcache.settings import TrainingConfig, parse_kwargs
from featcache.targets import TargetSource
from featcache.updates import Update
from featcache.views import Photo, Preprocessing, Recipe, augmentation, generator, normalise
from featcache.world import World


class Learner:
    """Network, optimiser, average and schedule in memory; files are somebody else's.

    Parameters
    ----------
    config : TrainingConfig
    world : World
        The processes that train together.
    data : Data

    Attributes
    ----------
    network, model, evaluated : nn.Module
        The network itself, as it is called in training (compiled, exchanging gradients), and
        what is validated and kept: the network, or the moving average of its weights.
    micro_batch, parts, steps : int
        Images of a forward pass, passes of this process in a step, steps of an epoch.
    """

    def __init__(self, config: TrainingConfig, world: World, data: Data) -> None:
        self.config = config
        self.world = world
        self.data = data
        self.device = world.device
        self.precision = resolve_precision(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._divide_steps()
        self._build()
        self.optimizer = make_optimizer(self.network, config)
        self.average = make_average(self.network, config.ema)
        self.evaluated = self.network if self.average is None else self.average.module
        self.loss = training_loss(config.loss, config.smoothing, config.positive_weight)
        self.targets = TargetSource.of(data.train_labels)
        self.validation_targets = TargetSource.of(data.validation_labels)
        self.state = State()
        self.wishes = self.agreed = (False, False)  # to stop, to save: ours, and anybody's

    def _divide_steps(self) -> None:
        n, size = len(self.data.train), self.config.batch_size
        self.steps = batches.steps_per_epoch(n, size)
        self.images_per_step = min(n, size)
        world = self.world.size
        self.micro_batch = self.config.micro_batch or math.ceil(self.images_per_step / world)
        self.micro_batch = min(self.micro_batch, self.images_per_step)
        parts = math.ceil(self.images_per_step / self.micro_batch)
        if parts % world:
            raise InputError(
                f"--batch-size {size}: {self.images_per_step} images in parts of "
                f"{self.micro_batch} cannot be dealt out to {world} processes; choose a multiple "
                "of --micro-batch times the number of processes"
            )
        self.parts = parts // world

    def _build(self) -> None:
        """The network, where it computes, and as it is trained."""
        config = self.config
        torch.manual_seed(config.seed)
        labels = self.data.train_labels
        self.spec = training_spec(
            config.arch, len(labels.classes), parse_kwargs(config.model_kwargs)
        )
        network = self.spec.build()
        self.preprocessing: Preprocessing = resolve_preprocessing(
            network, config.image_size, config.crop
        )
        self.photo = Photo(config.least_area, not config.no_flip, config.colour, config.randaugment)
        # An unknown name is said now.
        augmentation(config.augment, self.preprocessing, self.photo)
        initialise_head(classifier(network, self.spec), labels)
        self.network = network.to(self.device).to(memory_format=self.spec.memory_format)
        refuse_unfit(self.network.eval(), self.spec, self.preprocessing)
        if config.gradient_checkpointing:
            checkpoint_gradients(self.network, self.spec)
        compiled: Any = torch.compile(network) if config.compile else network
        self.model = self.world.wrap(compiled)

    def set_learning_rate(self) -> float:
        """That of the step which comes next."""
        total = self.config.epochs * self.steps
        lr = learning_rate(self.config, self.done, total, self.state.reductions)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    @property
    def done(self) -> int:
        """Steps of the run so far."""
        return self.state.epoch * self.steps + self.state.step

    def step(self, parts: Iterable[batches.Batch]) -> float:
        """One update by this process's parts of a step's images; returns the mean summed loss.

        Raises
        ------
        NotFinite
            If the loss is not; the weights stay as they are.
        InputError
            If no image is readable.
        """
        self.set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        update = Update(self.world, self.model, self.images_per_step, self.wishes)
        reason: str | None = None
        for k, batch in enumerate(parts):
            self._seed(k * self.world.size + self.world.rank)
            reason = self._note_unreadable(batch) or reason
            rows, pixels = batch.plain()
            if not len(rows) and self.world.size == 1:
                continue
            with update.part(last := k + 1 == self.parts):
                if not len(rows):  # the others wait for this process's gradients, of nothing
                    logits = self.forward(batch.pixels[:, 0])
                    losses = self.loss(logits, self.targets(batch.rows, self.device))
                else:
                    losses = self.loss(self.forward(pixels), self.targets(rows, self.device))
                update.add(losses, rows, last)
        value, wishes = update.finish(self.config.clip)
        self.agreed = wishes[0], wishes[1]
        if math.isnan(value):
            raise InputError(
                f"{self.config.images}: no image of a batch of {self.images_per_step} can be read "
                f"({reason}); check the files"
            )
        self.optimizer.step()
        self.world.share_statistics(self.network)
        if self.average is not None:
            self.average.update(self.network, self.done + 1)
        return value

    def _seed(self, part: int) -> None:
        """Chance inside the network (dropout, stochastic depth) is a function of the part."""
        keys = ("step", self.config.seed, self.state.epoch, self.state.step)
        rng = generator(*keys, part) if part else generator(*keys)
        torch.manual_seed(int(rng.integers(2**63)))

    def _note_unreadable(self, batch: batches.Batch) -> str | None:
        """Keep the reasons; returns the first one with its image."""
        bad = {
            str(self.data.train.ids[row]): reason
            for row, reason in zip(batch.rows, batch.reasons, strict=True)
            if reason is not None
        }
        self.state.unreadable |= bad
        return next((f"{name}: {why}" for name, why in bad.items()), None)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images -> float32 logits; of the network that is evaluated, when not training."""
        images = normalise(pixels.to(self.device, non_blocking=True), self.preprocessing)
        images = images.contiguous(memory_format=self.spec.memory_format)
        model = self.model if self.network.training else self.evaluated
        with autocast(self.precision, self.device):
            logits: torch.Tensor = model(images)
        return logits.float()

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Loss and F2 of the held-out images, of which each process scores others."""
        recipe = Recipe("eval", self.config.seed, 0, self.preprocessing)
        images = batches.ViewImages(self.data.validation, recipe)
        size = min(4 * self.micro_batch, 256)
        order = batches.row_batches([(0, len(self.data.validation))], size)
        mine = order[self.world.rank :: self.world.size]
        score = Score(self.device)
        self.network.eval()
        for batch in batches.loader(images, mine, self.config.workers, self.device):
            rows, pixels = batch.plain()
            if len(rows):
                score.update(self.forward(pixels), self.validation_targets(rows, self.device))
        self.network.train()
        score.add_up(self.world)
        return self.world.share(score.result())
