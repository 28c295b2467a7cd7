"""What does a training step cost, in time and memory, and how close is it to a bare torch loop?

Each network is a process of its own. Our learner and a loop of a few lines take turns at the
same step (forward, backward, update) of the same weights on synthetic images at 224 px with
7,178 classes. Operations, and bytes that the backward pass needs, are counted on shapes alone:
those in bfloat16 tell what a GPU has to hold. `--files` measures training from JPEG files
against decoding and steps alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.sparse import random_array
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.extraction import make_images
from benchmarks.measure import RESULTS, machine, memory_beyond, own_process, report, take_turns
from featcache import batches
from featcache.annotations import Labels
from featcache.datasets import Data
from featcache.images import ImageSet, find_images
from featcache.learner import Learner
from featcache.networks import FACTS, autocast, training_spec
from featcache.settings import TrainingConfig
from featcache.views import normalise
from featcache.world import World

CLASSES, SIDE = 7_178, 224
LR = 1e-4  # the steps are to stay finite, not to learn
TARGET = 0.95, 0.9  # of the bare loop: on a CPU; on a GPU, from files
TITLE = "A training step of each network"


def learner_of(arch: str, images: ImageSet, batch: int, device: torch.device) -> Learner:
    """The learner of a run of `arch`, with some random labels of every image."""
    config = TrainingConfig(
        images=str(images.directory),
        labels=[],
        arch=arch,
        out="",
        batch_size=batch,
        image_size=SIDE,
        lr=LR,
        weight_decay=0,
        warmup_steps=0,
        device=device.type,
    )
    rng = np.random.default_rng(0)
    positives = random_array((len(images), CLASSES), density=0.001, rng=rng, dtype=np.float32)
    positives.data[:] = 1
    names = [f"c{k}" for k in range(CLASSES)]
    labels = Labels(images.ids, names, positives.tocsr())
    return Learner(config, World(device), Data(images, images, labels, labels, []))


def synthetic(n: int) -> ImageSet:
    """Ids without files."""
    ids = np.array([f"i{k}" for k in range(n)])
    return ImageSet(Path(), ids, ids)


@dataclass
class Bench:
    """One network, twice: as the project trains it, and as a bare loop does."""

    arch: str
    batch: int
    device: torch.device
    steps: int  # a turn

    def __post_init__(self) -> None:
        self.learner = learner_of(self.arch, synthetic(self.batch), self.batch, self.device)
        self.learner.network.train()
        pixels = torch.randint(0, 256, (self.batch, 1, 3, SIDE, SIDE), dtype=torch.uint8)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        self.inputs = batches.Batch(np.arange(self.batch), pixels, [None] * self.batch)

    def ours(self) -> None:
        """Learner.step: from bytes on the host and label indices to new weights."""
        for _ in range(self.steps):
            self.learner.step([self.inputs])
        self._wait()

    def build_bare(self) -> None:
        """The same weights, in the same order of memory."""
        self.bare = self.learner.spec.build().to(self.device).train()
        self.bare.load_state_dict(self.learner.network.state_dict())
        self.bare = self.bare.to(memory_format=self.learner.spec.memory_format)
        self.optimizer = torch.optim.SGD(
            self.bare.parameters(), lr=LR, momentum=0.9, nesterov=True, fused=True
        )
        pixels = self.inputs.pixels[:, 0].to(self.device)
        images = normalise(pixels, self.learner.preprocessing)
        self.images = images.contiguous(memory_format=self.learner.spec.memory_format)
        self.targets = self.learner.targets(np.arange(self.batch), self.device).values

    def loop(self) -> None:
        """The same step; inputs and dense targets lie on the device as the network takes them."""
        for _ in range(self.steps):
            self.optimizer.zero_grad(set_to_none=True)
            with autocast(self.learner.precision, self.device):
                logits = self.bare(self.images)
            losses = binary_cross_entropy_with_logits(
                logits.float(), self.targets, reduction="none"
            )
            losses.sum(1).mean().backward()
            self.optimizer.step()
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int | None:
        """Bytes that weights, gradients, momentum and two steps take at most."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.ours()
            return torch.cuda.max_memory_allocated()
        weights = sum(t.numel() * t.element_size() for t in self.learner.network.parameters())
        held = memory_beyond(self.ours)
        return None if held is None else weights + held


def counted(arch: str, batch: int, bf16: bool) -> tuple[float, float]:
    """Floating-point operations of a step, and bytes kept for its backward pass.

    On shapes alone. A storage that several operations keep counts once; weights do not count,
    but their copies in bfloat16 do.
    """
    kept: dict[int, int] = {}
    with FakeTensorMode():
        network = training_spec(arch, CLASSES, {}).build().train()
        own = {t.untyped_storage()._cdata for t in network.state_dict().values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter:
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = network(torch.randn(batch, 3, SIDE, SIDE))
            logits.float().sum().backward()
    return counter.get_total_flops(), sum(kept.values())


def counts(arch: str) -> dict[str, float]:
    """Of an image, and in bfloat16 of the weights: what does not grow with the batch."""
    operations, kept = counted(arch, 2, bf16=False)  # a single image cannot always be normalised
    two, four = (counted(arch, batch, bf16=True)[1] for batch in (2, 4))
    return {
        "GFLOP an image": operations / 2e9,
        "float32: kept, MB an image": kept / 2e6,
        "bf16: kept, MB an image": (four - two) / 2e6,
        "bf16: copies of weights, MB": (2 * two - four) / 1e6,
    }


def head(arch: str, device: torch.device) -> dict[str, Any]:
    """What a row begins with."""
    with torch.device("meta"):
        network = training_spec(arch, CLASSES, {}).build()
    return {
        "network": arch,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(),
        "parameters, M": sum(p.numel() for p in network.parameters()) / 1e6,
        "features": FACTS[arch].features if arch in FACTS else "",
    }


def measure(arch: str, batch: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """The row of a network."""
    bench = Bench(arch, batch, device, steps=1 if device.type == "cpu" else 20)
    peak = bench.peak()
    bench.build_bare()
    contestants: dict[str, Callable[[], Any]] = {"ours": bench.ours, "bare": bench.loop}
    take_turns(contestants, 2)  # kernels are chosen, momentum is made
    spent: dict[str, list[float]] = {name: [] for name in contestants}

    def clocked(name: str) -> None:
        begun = time.process_time()
        contestants[name]()
        spent[name].append(time.process_time() - begun)

    times = take_turns({name: partial(clocked, name) for name in contestants}, repeats)
    ours, bare = times["ours"].seconds, times["bare"].seconds
    ratios = [b / a for a, b in zip(ours, bare, strict=True)]
    on_cores = [b / a for a, b in zip(spent["ours"], spent["bare"], strict=True)]
    images = batch * bench.steps
    return {
        **head(arch, device),
        "batch": batch,
        "images/s": images / median(ours),
        "bare loop, images/s": images / median(bare),
        "ours / bare": median(ratios),
        "least and greatest": f"{min(ratios):.3g} to {max(ratios):.3g}",
        # Where other work shares the cores, the seconds spent on them tell more than the wall.
        "in core seconds": median(on_cores) if device.type == "cpu" else "",
        "target": f">= {TARGET[0] if device.type == 'cpu' else TARGET[1]:g}",
        "peak GB": "" if peak is None else peak / 1e9,
        **counts(arch),
    }


def from_files(arch: str, batch: int, device: torch.device, workers: int, n: int) -> dict[str, Any]:
    """Training from JPEG files, against decoding alone and steps alone.

    On a CPU the two share the cores: with rates a and b alone, both cannot beat
    1 / (1/a + 1/b). On a GPU they do not, and the limit is the lesser one.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = find_images(make_images(Path(folder) / "images", n, (640, 480)))
        learner = learner_of(arch, images, batch, device)
        learner.network.train()
        config = learner.config

        def source() -> Any:
            pictures = batches.TrainingImages(
                images, learner.preprocessing, config.augment, config.seed, learner.photo
            )
            order = batches.epoch_batches(n, batch, config.seed, 0)
            return batches.loader(pictures, order, workers, device)

        def decode() -> None:
            for _ in source():
                pass

        def whole() -> None:
            for part in source():
                learner.step([part])

        ready = next(source())

        def steps() -> None:
            for _ in range(n // batch):
                learner.step([ready])

        steps()
        times = take_turns({"decode": decode, "steps": steps, "whole": whole}, 3)
    a, b, both = (n // batch * batch / times[k].median for k in ("decode", "steps", "whole"))
    limit = 1 / (1 / a + 1 / b) if device.type == "cpu" else min(a, b)
    return {
        "network": f"{arch}, from JPEG files",
        "device": device.type,
        "batch": batch,
        "images/s": both,
        "decoding alone, images/s": a,
        "steps alone, images/s": b,
        "ours / limit": both / limit,
        "target": f">= {TARGET[1]:g}",
    }


def kept_rows(name: str, measured: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of networks that were not measured now, if this machine has measured them."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        # What follows the machine is the command, which names networks.
        if not f"{file.readline().rstrip()};".startswith(f"# {TITLE}; {machine()};"):
            return []
        return [dict(row) for row in csv.DictReader(file) if row["network"] not in measured]


def main() -> None:
    """Measure each network in a process of its own, and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small networks, few repeats")
    parser.add_argument("--networks", help="only these, with commas; others' rows are kept")
    parser.add_argument("--batch-size", type=int, default=0, help="images a step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=0, help="turns of each contestant")
    parser.add_argument("--files", action="store_true", help="from JPEG files as well")
    parser.add_argument("--counts", action="store_true", help="only what is counted on shapes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = torch.device(given.device)
    batch = given.batch_size or (2 if device.type == "cpu" else 64)
    repeats = given.repeats or (3 if given.quick else 15)
    if given.one:
        workers = len(os.sched_getaffinity(0)) - (device.type == "cuda")
        if given.counts:
            print(json.dumps(head(given.one, device) | counts(given.one)))
        elif given.files:
            n = max(64, (4 if device.type == "cpu" else 64) * batch)
            print(json.dumps(from_files(given.one, batch, device, workers, n)))
        else:
            print(json.dumps(measure(given.one, batch, device, repeats)))
        return
    usual = ["resnet18", "mobilenetv3_small_050"] if given.quick else list(FACTS)
    networks = given.networks.split(",") if given.networks else usual
    counted_only = ["--counts"] if given.counts else []
    options = [
        *counted_only,
        f"--batch-size={batch}",
        f"--device={given.device}",
        f"--repeats={repeats}",
    ]
    rows: list[dict[str, Any]] = []
    for arch in networks:
        for files in [[], ["--files"]] if given.files else [[]]:
            answer = own_process("benchmarks.training", f"--one={arch}", *options, *files)
            rows.append(json.loads(answer.splitlines()[-1]))
    name = "training_quick" if given.quick else "training"
    rows += kept_rows(name, [row["network"] for row in rows])
    place = {arch: k for k, arch in enumerate(FACTS)}
    report(name, sorted(rows, key=lambda row: place.get(str(row["network"]), len(place))), TITLE)


if __name__ == "__main__":
    main()
