"""Watch validation while training: loss and mean per-image F2 at the best of a grid of cuts."""

from __future__ import annotations

import numpy as np
import torch

from featcache.errors import InputError
from featcache.losses import summed_loss
from featcache.targets import Targets
from featcache.world import World

BETA_SQUARED = 4.0
CUTS = tuple(np.round(np.geomspace(0.02, 0.8, 48), 6).tolist())


class Score:
    """Running sums of loss and per-image F2 at every cut of the grid.

    sum_i (1 + b^2) TP_i / (b^2 |y_i| + |yhat_i|) for each cut: sums add over
    batches and over processes. An image without true and predicted labels counts as 1.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuts = torch.tensor(CUTS, device=device)
        # Rounding in long sums of float32 would depend on the order; float64 is cheap here.
        self.f_sums = torch.zeros(len(CUTS), dtype=torch.float64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0

    def update(self, logits: torch.Tensor, targets: Targets) -> None:
        """Add a batch."""
        truth = targets.values >= 0.5
        probabilities = torch.sigmoid(logits)
        if targets.known is not None:
            probabilities = probabilities.masked_fill(~targets.known, -1.0)
        n_true = truth.sum(1) + targets.outside
        for c, cut in enumerate(self.cuts):
            predicted = probabilities >= cut
            tp = (predicted & truth).sum(1)
            denominator = BETA_SQUARED * n_true + predicted.sum(1)
            f = torch.where(denominator > 0, (1 + BETA_SQUARED) * tp / denominator, 1.0)
            self.f_sums[c] += f.sum(dtype=torch.float64)
        self.loss_sum += summed_loss(logits, targets).sum(dtype=torch.float64)
        self.count += len(logits)

    def add_up(self, world: World) -> None:
        """Sums over all processes, each of which has scored other images."""
        sums = torch.cat([self.f_sums, self.loss_sum[None], self.f_sums.new_full((1,), self.count)])
        world.add_up(sums)
        self.f_sums, self.loss_sum = sums[:-2], sums[-2]
        self.count = round(sums[-1].item())

    def result(self) -> dict[str, float]:
        """Mean loss, the best F2 of the grid, and its cut.

        Raises
        ------
        InputError
            If no image was scored.
        """
        if not self.count:
            raise InputError("none of the held-out images can be read; check the files in --images")
        best = int(torch.argmax(self.f_sums))
        return {
            "loss": self.loss_sum.item() / self.count,
            "f2": self.f_sums[best].item() / self.count,
            "threshold": CUTS[best],
        }
