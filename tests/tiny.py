"""Images, labels and networks so small that training takes a second.

An image shows up to four coloured squares on grey noise; its labels are their colours.
"""

from __future__ import annotations

import csv
import json
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

ROOT = Path(__file__).parents[1]
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


class Separate(nn.Module):
    """No image's output depends on the others of its batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.last = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.body(x))
        return logits


def separate(num_classes: int) -> nn.Module:
    """For ``--arch tests.tiny:separate``."""
    return Separate(num_classes)


def network(num_classes: int, width: int = 8) -> nn.Module:
    """For ``--arch tests.tiny:network``."""
    return TinyNet(num_classes, width)


def doubled(num_classes: int) -> nn.Module:
    """For ``--arch tests.tiny:doubled``."""
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


def basic_training(data: Path, out: Path) -> dict[str, Any]:
    """Options of a training that takes a third of a second; data as of `make_data`."""
    return {
        "images": str(data / "images"),
        "labels": [str(data / "labels.csv")],
        "arch": "tests.tiny:network",
        "out": str(out),
        "validation": "16",
        "image_size": SIDE,
        "augment": "tests.tiny:shaken",
        "epochs": 3,
        "batch_size": 8,
        "optimizer": "adam",
        "lr": 0.02,
        "warmup_steps": 4,
        "schedule": "cosine",
        "device": "cpu",
        "workers": 0,
        "threads": 1,
    }


def options(**changes: Any) -> list[str]:
    """``lr=0.1, labels=[a, b]`` -> ``--lr=0.1 --labels=a --labels=b``; None leaves one out."""
    words: list[str] = []
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
            continue
        values = value if isinstance(value, list) else [] if value is None else [value]
        words += [f"{flag}={item}" for item in values]
    return words


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments: str, output: Path) -> subprocess.Popen[bytes]:
    """``python -m featcache`` in another process; what it prints goes to ``output.out``, ``.err``.

    Not to pipes, which workers that outlive a killed process would keep open.
    """
    with open(f"{output}.out", "wb") as out, open(f"{output}.err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "featcache", *arguments],
            env=_environment(),
            stdout=out,
            stderr=err,
        )


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the condition holds; fails when the process ends or time runs out before."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.005)


class Nursery:
    """A process that has imported everything once and forks children that can be killed.

    In `run` some code finds its keyword arguments (paths as Path), these functions, and
    leaves its result in ``answer``:

    ``child(action, errors=None)``
        number of a forked process whose exit status is ``action()``;
    ``ended(pid)``
        its exit status once it has ended, negative if it was killed;
    ``arm(k, torn)``
        kill this process just before its k-th call that changes something on disk,
        or, if torn, once half of a file is written.
    """

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate(timeout=60)

    def run(self, code: str, out: Path | None = None, **names: Any) -> Any:
        """The answer of the code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"code": code, "out": None if out is None else str(out), "names": names}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        assert not reply["error"], reply["error"]
        return reply["answer"]


_NURSERY = """
import json, os, pathlib, random, signal, sys, time, traceback
from pathlib import Path
import safetensors.torch, torch
from PIL import Image
from featcache import cli, extraction, training

torch.set_num_threads(1)
Image.init()
os.fsync = lambda handle: None  # what a killed process has written is not lost; only slow

def child(action, errors=None):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if errors is not None:
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            code = action()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def arm(k, torn):
    left = [k]
    def hook(owner, name, path_at=None):
        real = getattr(owner, name)
        def hooked(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if torn and path_at is not None:
                    real(*args, **kwargs)
                    os.truncate(args[path_at], os.path.getsize(args[path_at]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(owner, name, hooked)
    for name in ("replace", "unlink", "mkdir", "pwrite"):
        hook(os, name)
    hook(torch, "save", 1)
    hook(safetensors.torch, "save_file", 1)
    hook(pathlib.Path, "write_bytes", 0)

for line in sys.stdin:
    request = json.loads(line)
    names = {**globals(), **request["names"], "out": request["out"] and Path(request["out"])}
    error = None
    try:
        exec(request["code"], names)
    except Exception:  # whatever the code raises is told to the test, which fails with it
        error = traceback.format_exc()
    print(json.dumps({"error": error, "answer": names.get("answer")}), flush=True)
"""
