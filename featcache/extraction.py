"""Dump the penultimate embeddings of an image set into a cache."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from torch import nn

from featcache import batches
from featcache.annotations import Labels, read_labels
from featcache.console import Interrupted, Progress, StopRequest, duration
from featcache.errors import InputError
from featcache.images import ImageSet, find_images, read_ids
from featcache.networks import (
    LastLayer,
    autocast,
    classifier,
    classifier_name,
    head_error,
    network_id,
    recorded_features,
    resolve_device,
    resolve_precision,
)
from featcache.runs import CLASSES, Run
from featcache.settings import ExtractionConfig
from featcache.views import Recipe, normalise
from featcache.writing import CacheContents, CacheWriter

ROWS_A_BLOCK = 512  # about; a block is a whole number of batches
TOLERANCE = {"float32": 1e-3, "bf16": 2e-2}


@dataclass
class Embedder:
    """A frozen network that turns views into penultimate features.

    Attributes
    ----------
    run : Run
        Where the network comes from.
    network : Module
        In evaluation mode, on the device.
    layer : Linear or Conv2d
        Its last layer; the features are the layer's input.
    device : torch.device
    precision : str
        ``float32`` or ``bf16``.
    """

    run: Run
    network: nn.Module
    layer: LastLayer
    device: torch.device
    precision: str

    @classmethod
    def load(cls, config: ExtractionConfig) -> Embedder:
        """Read the run and put its network on the device."""
        run = Run.open(config.run)
        device = resolve_device(config.device)
        network = run.load_network().to(device).to(memory_format=run.network.memory_format)
        layer = classifier(network, run.network)
        return cls(run, network, layer, device, resolve_precision(config.precision, device))

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 3, s, s) uint8 -> features (b, d) and logits (b, K), float32."""
        images = normalise(pixels.to(self.device, non_blocking=True), self.run.preprocessing)
        images = images.contiguous(memory_format=self.run.network.memory_format)
        with recorded_features(self.layer) as seen, autocast(self.precision, self.device):
            logits = self.network(images)
        return seen[0].float(), logits.float()

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """(b, v, 3, s, s) uint8 -> (b, v, d) float32, one view at a time to bound memory."""
        views = [self.forward(pixels[:, k])[0] for k in range(pixels.shape[1])]
        return torch.stack(views, 1).cpu().numpy()

    @torch.inference_mode()
    def check(self, pixels: torch.Tensor) -> None:
        """Features times the last layer must give the network's own logits.

        Raises
        ------
        InputError
            If they do not: the features would be of no use to a linear head.
        """
        features, logits = self.forward(pixels)
        error = head_error(features, logits, self.layer)
        if not error <= TOLERANCE[self.precision]:
            raise InputError(
                f"{self.run.path}: features @ W0.T + b0 differ from the network's own logits by "
                f"{error:.2g} of their size; the network does something after its last linear layer"
            )

    @property
    def head(self) -> tuple[np.ndarray, np.ndarray]:
        """W0 (K, d) and b0 (K,), float32; b0 is zero where the layer has none."""
        weight = self.layer.weight.detach().flatten(1).float().cpu().numpy()
        if self.layer.bias is None:
            return weight, np.zeros(len(weight), np.float32)
        return weight, self.layer.bias.detach().float().cpu().numpy()


def choose_images(config: ExtractionConfig) -> tuple[ImageSet, list[str]]:
    """The rows of the cache; ids without a file keep their row and become unreadable ones."""
    images = find_images(config.images)
    if not config.ids:
        return images, []
    ids = read_ids(config.ids)
    found, missing = images.select(ids)
    if not len(found):
        raise InputError(
            f"{config.ids}: none of its {len(ids):,} ids is an image below {config.images} "
            f"(the first is {ids[0]!r}); files must be named by their ids"
        )
    if missing:  # a name that does not exist is decoded as such: the row stays, invalid
        names = dict(zip(found.ids.tolist(), found.files.tolist(), strict=True))
        files = [names.get(i, f"{i}.missing") for i in ids]
        found = ImageSet(images.directory, np.array(ids), np.array(files))
    return found, missing


def choose_labels(config: ExtractionConfig, run: Run, images: ImageSet) -> Labels | None:
    """Labels of the rows in the classes of the network; says how many images have none."""
    if not config.labels:
        return None
    labels = read_labels(
        config.labels,
        classes=run.path / CLASSES,
        unlisted="unknown" if config.unlisted == "unknown" else "negative",
    )
    unused = ~np.isin(labels.ids, images.ids)
    selected = labels.select(images.ids)
    print(
        f"{int(selected.known.sum()):,} of {len(images):,} images have labels; "
        f"{int(unused.sum()):,} labelled images are not among them"
        + (f" ({' '.join(labels.ids[unused][:3])} ...)" if unused.any() else ""),
        flush=True,
    )
    if not selected.known.any():
        raise InputError(
            f"{config.labels[0]}: no image below {config.images} has an entry in it; "
            f"its first id is {str(labels.ids[0])!r}"
        )
    return selected


def file_sizes(images: ImageSet) -> str:
    """sha256 over the ordered ids and the sizes of their files."""
    digest = hashlib.sha256()
    for row, image_id in enumerate(images.ids):
        try:
            size = os.path.getsize(images.path(row))
        except OSError:
            size = -1
        digest.update(f"{image_id}\t{size}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of everything that can change a feature's bits."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def extract(config: ExtractionConfig) -> Path:
    """Write a cache of one network and one image set, or go on with one that was stopped.

    Parameters
    ----------
    config : ExtractionConfig
        Everything; ``config.out`` is the cache.

    Returns
    -------
    Path
        The cache.

    Raises
    ------
    InputError
        Wrong input, an existing cache, or an unfinished one of other settings.
    Interrupted
        After Ctrl-C or SIGTERM; what is written is kept.

    Notes
    -----
    An unreadable image keeps its row (``valid`` False). The composition of a batch is a
    function of the row index alone, so a resumed extraction equals an unbroken one.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    embedder = Embedder.load(config)
    run = embedder.run
    recipe = Recipe(config.views, config.seed, config.view_count, run.preprocessing)
    images, missing = choose_images(config)
    if missing:
        print(
            f"{len(missing):,} ids have no file ({' '.join(missing[:3])} ...); "
            "their rows will be marked invalid",
            flush=True,
        )
    check_network(embedder, images, config.batch_size)
    weight, bias = embedder.head
    facts = provenance(config, embedder, recipe)
    contents = CacheContents(
        ids=images.ids,
        views=list(recipe.augmentations()),
        dim=weight.shape[1],
        labels=choose_labels(config, run, images),
        classes=run.classes,
        class_names=run.names,
        weight=weight,
        bias=bias,
        provenance=facts,
    )
    # Where the image set lies and how it was asked for may change; what it is may not.
    told = {k: v for k, v in facts.items() if k not in ("images", "labels", "ids", "run")}
    writer = CacheWriter(
        config.out,
        contents,
        fingerprint=told | {"file_sizes": file_sizes(images)},
        block_rows=config.batch_size * max(1, ROWS_A_BLOCK // config.batch_size),
        overwrite=config.overwrite,
    )
    started = time.monotonic()
    with writer:
        for message in writer.messages:
            print(message, flush=True)
        _fill(writer, embedder, batches.ViewImages(images, recipe), config)
        wall = round(time.monotonic() - started, 2)
        path = writer.finish({"wall_seconds": wall})
    return path


def check_network(embedder: Embedder, images: ImageSet, batch_size: int) -> None:
    """Let the network check itself on the first images that can be read.

    Before anything is written, so that a refusal leaves nothing behind.
    """
    plain = batches.ViewImages(images, Recipe("eval", 0, 0, embedder.run.preprocessing))
    for rows in batches.row_batches([(0, len(images))], batch_size):
        batch = batches.collate([plain[row] for row in rows])
        if batch.readable.any():
            embedder.check(batch.pixels[torch.from_numpy(batch.readable), 0])
            return


def provenance(config: ExtractionConfig, embedder: Embedder, recipe: Recipe) -> dict[str, Any]:
    """What made the features, as JSON."""
    run = embedder.run
    layer = classifier_name(embedder.network, run.network)
    return {
        "network": asdict(run.network) | {"layer": layer},
        "network_id": network_id(embedder.network, run.preprocessing, layer),
        "preprocessing": asdict(run.preprocessing),
        "views": {"recipe": recipe.name, "seed": recipe.seed, "count": recipe.count},
        "versions": versions(),
        "device": embedder.device.type,
        "dtype": embedder.precision,
        "threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
        "run": str(config.run),
        "images": str(config.images),
        "labels": [str(path) for path in config.labels],
        "ids": str(config.ids),
    }


def _fill(
    writer: CacheWriter, embedder: Embedder, images: batches.ViewImages, config: ExtractionConfig
) -> None:
    """Compute and write every block that is not durable yet."""
    pending = writer.pending()
    n = len(images.images)
    done = n - sum(stop - start for start, stop in pending)
    if done:
        print(f"{config.out}: going on at {done:,} of {n:,} images", flush=True)
    progress = Progress(n, "images", done)
    waiting = forward = writing = 0.0
    order = batches.row_batches(pending, config.batch_size)
    source = iter(batches.loader(images, order, config.workers, embedder.device))
    with StopRequest() as stop:
        for start, end in pending:
            features: list[np.ndarray] = []
            reasons: list[str | None] = []
            while len(reasons) < end - start:
                if stop.asked:
                    progress.clear()
                    raise Interrupted(
                        f"stopped at {start:,} of {n:,} images; the same command goes on from there"
                    )
                clock = [time.monotonic()]
                batch = next(source)
                clock.append(time.monotonic())
                features.append(embedder(batch.pixels))
                reasons += batch.reasons
                clock.append(time.monotonic())
                if len(reasons) == end - start:
                    writer.write(start, np.concatenate(features), reasons)
                writing += time.monotonic() - clock[2]
                waiting, forward = waiting + clock[1] - clock[0], forward + clock[2] - clock[1]
                progress.advance(
                    len(batch.reasons),
                    f"waiting for images {waiting:.0f} s, network {forward:.0f} s, "
                    f"writing {writing:.0f} s",
                )
    progress.print(
        f"{config.out}: {progress.describe()} in {duration(waiting + forward + writing)} "
        f"(waiting for images {waiting:.1f} s, network {forward:.1f} s, writing {writing:.1f} s)"
    )
