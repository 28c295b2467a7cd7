"""How do the losses of a step's images, part by part, become one change of the weights?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from featcache.world import World


class NotFinite(Exception):
    """The loss of some images is infinite or no number.

    Parameters
    ----------
    loss : float
    rows : ndarray
        The images of this process's parts whose loss it is.
    """

    def __init__(self, loss: float, rows: np.ndarray) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss = loss
        self.rows = rows


class Arriving:
    """Values on their way from a device, which goes on with its other work meanwhile."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> list[float]:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._values.tolist()
        return found


class Update:
    """The gradient of the mean loss over a step's images, from parts that fit into memory.

    Parameters
    ----------
    world : World
        The processes among which the parts are dealt out.
    model : nn.Module
        The network as `World.wrap` returns it.
    images : int
        Images of the step, over all processes.
    wishes : sequence of bool
        What this process wants; :meth:`finish` says what any of them wants.

    Notes
    -----
    An image that cannot be read leaves the mean. A part's gradients are divided by `images`
    at once, and multiplied by images / readable ones at the end: how many can be read is
    known no sooner.
    """

    def __init__(
        self, world: World, model: nn.Module, images: int, wishes: Sequence[bool] = ()
    ) -> None:
        self.world, self.model, self.images = world, model, images
        self._sums = torch.zeros(2 + len(wishes), dtype=torch.float64, device=world.device)
        for k, wish in enumerate(wishes, 2):
            if wish:
                self._sums[k].fill_(1)
        self._parts: list[tuple[np.ndarray, torch.Tensor]] = []
        self._arriving: Arriving | None = None

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around a part's forward pass and :meth:`add`; the last one exchanges gradients."""
        with nullcontext() if last else self.world.without_exchange(self.model):
            yield

    def add(self, losses: torch.Tensor, rows: np.ndarray, last: bool) -> None:
        """The losses (b,) of some images; an empty `rows` means that they count for nothing."""
        total = losses.sum() if len(rows) else losses.sum() * 0
        self._parts.append((rows, total.detach()))
        self._sums[0] += total.detach()
        self._sums[1] += len(rows)
        if last:
            self._send()  # before the backward pass, which the device does meanwhile
        (total * self.world.size / self.images).backward()

    def _send(self) -> None:
        self._arriving = Arriving(self.world.add_up(self._sums))

    def finish(self, clip: float = 0.0) -> tuple[float, list[bool]]:
        """Complete the gradients; returns the mean loss (NaN if no image counts), and the wishes.

        Raises
        ------
        NotFinite
            In every process alike.
        """
        if self._arriving is None:
            self._send()
        assert self._arriving is not None
        loss_sum, count, *wishes = self._arriving.get()
        if not math.isfinite(loss_sum):
            bad = [rows for rows, total in self._parts if not math.isfinite(total.item())]
            raise NotFinite(loss_sum, np.concatenate(bad) if bad else np.zeros(0, np.int64))
        if count and count != self.images:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.images / count)
        if clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        return loss_sum / count if count else math.nan, [wish > 0 for wish in wishes]
