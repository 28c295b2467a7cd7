"""How did a training go?  Its log as a picture."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from featcache import runs
from featcache.atomic import write_atomically


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(path: Path, log: Sequence[dict[str, float]]) -> None:
    """``curves.png`` in the folder of a run: losses, F2 and learning rate by epoch.

    The same log makes the same bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in log]
    figure = Figure(figsize=(7, 7), layout="constrained")
    losses, scores, rates = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1))
    marker = "o" if len(log) < 30 else ""  # a single point would not be seen
    for column, label in (("train_loss", "training"), ("loss", "validation")):
        losses.plot(epochs, [row[column] for row in log], marker=marker, ms=3, label=label)
    losses.set_ylabel("loss, summed over classes")
    losses.legend()
    f2 = [row["f2"] for row in log]
    best = max(range(len(log)), key=f2.__getitem__)
    scores.plot(epochs, f2, marker=marker, ms=3, color="C1")
    scores.annotate(
        f"{f2[best]:.4f}", (epochs[best], f2[best]), (0, -14), textcoords="offset points"
    )
    scores.set_ylabel("validation F2")
    rates.step(epochs, [row["lr"] for row in log], where="mid", color="C2")
    if min(row["lr"] for row in log) > 0:
        rates.set_yscale("log")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("epoch")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (losses, scores, rates):
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    write_atomically(path / runs.CURVES, buffer.getvalue())
