"""What is this network, what was it trained on, and how well does it do?  For people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from featcache import runs
from featcache.checkpoints import State
from featcache.datasets import Data


def write_card(
    path: Path, resolved: dict[str, Any], data: Data, network: nn.Module, state: State
) -> None:
    """``README.md`` in the folder of a run; says nothing of time, so that it can be compared."""
    runs.write_text(path / runs.CARD, card(resolved, data, network, state))


def card(resolved: dict[str, Any], data: Data, network: nn.Module, state: State) -> str:
    """The text, in Markdown."""
    config = resolved["config"]
    size = resolved["preprocessing"]["image_size"]
    parameters = sum(p.numel() for p in network.parameters())
    key, sign = ("f2", 1) if config["monitor"] == "f2" else ("loss", -1)
    best = max(state.log, key=lambda row: sign * row[key])
    labels = data.train_labels
    rows = [
        ("architecture", f"`{config['arch']}` {_options(resolved['network']['kwargs'])}".rstrip()),
        ("parameters", f"{parameters:,}"),
        ("input", f"{size} x {size} pixels"),
        ("outputs", f"{len(labels.classes):,} classes, named in `{runs.CLASSES}`"),
        ("training images", f"{len(data.train):,}, {labels.positives.nnz:,} positive labels"),
        ("held-out images", f"{len(data.validation):,}, listed in `{runs.VALIDATION_IDS}`"),
        ("labelled images without a file", f"{len(data.missing):,}"),
        ("label files", ", ".join(f"`{file}`" for file in config["labels"])),
        ("a label in no file", f"is {config['unlisted']}"),
        ("loss", f"{config['loss']}, smoothing {config['smoothing']:g}"),
        ("optimiser", f"{config['optimizer']}, learning rate {config['lr']:g}, {_step(config)}"),
        ("moving average", f"decay {config['ema']:g}" if config["ema"] else "none"),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    how = "training is finished" if state.finished else "training goes on"
    return f"""# {config["arch"]}, {len(labels.classes):,} classes

An image network for multi-label classification, trained from scratch by `featcache train`: no
pretrained weights. `config.json` holds every setting.

| | |
| --- | --- |
{table}

## How well it does

On the held-out images, after epoch {best["epoch"]:.0f} of {state.epoch} ({how}):

| measure | value |
| --- | --- |
| mean F2 per image at the best cut | {best["f2"]:.4f} (at {best["threshold"]:.3f}) |
| cross-entropy, summed over classes | {best["loss"]:.3f} |

The cut is chosen on the same images, so this F2 is slightly high. Held-out images come from the
same source as those of training: on images of other places the network does worse, which is what
heads are fitted for.
"""


def _options(kwargs: dict[str, Any]) -> str:
    return f"({', '.join(f'{k}={v}' for k, v in kwargs.items())})" if kwargs else ""


def _step(config: dict[str, Any]) -> str:
    return f"{config['batch_size']:,} images a step, schedule {config['schedule']}"
