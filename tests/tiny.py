"""Images, labels and networks so small that training takes a second.

An image shows up to four coloured squares on grey noise; its labels are their colours.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

COLOURS = {"blue": (20, 20, 250), "green": (20, 250, 20), "red": (250, 20, 20), "white": (255,) * 3}
SIDE = 16


def draw(colours: list[str], rng: np.random.Generator) -> Image.Image:
    """Squares of the colours in different quarters of a noisy image."""
    pixels = rng.integers(60, 140, (SIDE, SIDE, 1)).repeat(3, 2).astype(np.uint8)
    for colour, quarter in zip(colours, rng.permutation(4), strict=False):
        top, left = np.array(divmod(int(quarter), 2)) * (SIDE // 2) + rng.integers(0, 3, 2)
        pixels[top : top + 5, left : left + 5] = COLOURS[colour]
    return Image.fromarray(pixels)


def write_lists(path: Path, label_sets: dict[str, list[str]]) -> Path:
    """A label file ``image_id,labels``."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_id", "labels"))
        writer.writerows((name, " ".join(labels)) for name, labels in label_sets.items())
    return path


def make_data(root: Path, n: int = 48, seed: int = 0, prefix: str = "i") -> dict[str, list[str]]:
    """``images/<id>.png`` and ``labels.csv`` below root; returns the labels of each id."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    label_sets: dict[str, list[str]] = {}
    for i in range(n):
        colours = [c for c in COLOURS if rng.random() < 0.4]
        name = f"{prefix}{i:03d}"
        draw(colours, rng).save(root / "images" / f"{name}.png")
        label_sets[name] = colours
    write_lists(root / "labels.csv", label_sets)
    return label_sets


class TinyNet(nn.Module):
    """Two convolutions with batch normalisation, dropout, and a linear layer."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1),
        )
        self.last = nn.Linear(2 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.body(x))
        return logits


class Doubled(TinyNet):
    """Does something to its logits, so that features and last layer do not give them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def network(num_classes: int, width: int = 8) -> nn.Module:
    """For ``--arch tiny:network``."""
    return TinyNet(num_classes, width)


def doubled(num_classes: int) -> nn.Module:
    """For ``--arch tiny:doubled``."""
    return Doubled(num_classes)


def shaken(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """An augmentation: mirrored or not, moved a little."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return image.rotate(float(rng.uniform(-20, 20))).resize((size, size))


def sleepy(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """``shaken``, slowly enough for signals to arrive meanwhile."""
    time.sleep(0.02)
    return shaken(image, size, rng)


def options(**changes: Any) -> list[str]:
    """``lr=0.1, labels=[a, b]`` -> ``--lr 0.1 --labels a --labels b``; None leaves one out."""
    words: list[str] = []
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
            continue
        values = value if isinstance(value, list) else [] if value is None else [value]
        words += [word for item in values for word in (flag, str(item))]
    return words


def start(*arguments: str, output: Path, group: bool = False) -> subprocess.Popen[bytes]:
    """``python -m featcache`` in another process that knows this module.

    Standard output and error go to files, since workers may outlive a killed process
    and would keep a pipe open.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    with open(f"{output}.out", "wb") as out, open(f"{output}.err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "featcache", *arguments],
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=group,
        )


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the condition holds; fails when the process ends or time runs out before."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.005)
